"""The page's style sheet: light and dark, without external fonts or files."""

LIGHT = {
    "paper": "#fbfaf8", "card": "#ffffff", "ink": "#1f2328", "soft": "#62676f", "line": "#e4e1dc",
    "accent": "#2f6f8f", "good": "#2b7a4b", "bad": "#b3432b", "none": "#8a8f98",
    "c1": "#c2702a", "c2": "#6b5fb5", "c3": "#4b8a4f", "c4": "#b0497d", "c5": "#7d6b3c",
    "c6": "#3d9a9a", "c7": "#8c4a3f",
}  # fmt: skip
"""Colours by the name of their CSS variable. No two are equal: a chart's colours are told apart by their values."""
CURVES = ("accent", "c1", "c2", "c3", "c4", "c5", "c6", "c7")
"""Names of the colours that tell curves and runs apart."""

CSS = (
    f"""
:root {{
  color-scheme: light dark;
  {" ".join(f"--{name}: {colour};" for name, colour in LIGHT.items())}
}}
"""
    + """\
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --card: #1e2125; --ink: #e6e4e0; --soft: #9ba1a9; --line: #30343a;
    --accent: #7cb7d3; --good: #6cc08b; --bad: #e58a73; --none: #7d838c;
    --c1: #e0a06a; --c2: #a79be6; --c3: #86c48a; --c4: #e08fb5; --c5: #c4b07a;
    --c6: #74c7c7; --c7: #c98b7f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1240px; padding: 48px 24px 72px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 4px; }
h3 { font-size: 15px; margin: 26px 0 10px; color: var(--soft); font-weight: 600; }
p { margin: 0 0 14px; max-width: 46em; }
p.lead { font-size: 18px; color: var(--soft); }
.soft { color: var(--soft); }
.absent { color: var(--none); font-style: italic; }
ul.notes { margin: 0 0 14px; padding-left: 20px; color: var(--soft); }
table { border-collapse: collapse; width: 100%; margin: 12px 0 6px; font-size: 15px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 8px 12px 8px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small, .range { color: var(--soft); font-size: 13px; }
.badge { font-weight: 600; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .none { color: var(--none); }
.scroll { overflow-x: auto; }
.grid-cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(var(--cell), 1fr)); }
figure {
  margin: 0; padding: 10px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
}
figure .strip { display: flex; gap: 8px; align-items: flex-start; }
figure .strip div { flex: none; }
figure img { display: block; image-rendering: pixelated; border-radius: 4px; max-width: 100%; }
figure .role { font-size: 12px; color: var(--soft); display: block; padding-top: 3px; }
figcaption { font-size: 14px; line-height: 1.4; padding-top: 8px; }
figcaption .marks { display: block; font-size: 13px; color: var(--soft); padding-top: 3px; }
.marks span { white-space: nowrap; margin-right: 6px; }
.chart { padding: 12px 12px 8px; }
.chart b { font-size: 15px; }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 6px 0 0; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: 4px 10px; font-size: 13px; color: var(--soft); }
.bars span { text-align: right; max-width: 40vw; overflow-wrap: anywhere; }
.bars div { display: flex; align-items: center; padding-right: 12em; white-space: pre; }
.bars i { flex: none; height: 16px; border-radius: 2px; min-width: 1px; }
.stack { display: flex; height: 18px; background: var(--line); }
.k0 { background: var(--accent); } .k1 { background: var(--c1); } .k2 { background: var(--c2); }
.k3 { background: var(--c3); } .k4 { background: var(--c4); } .k5 { background: var(--c5); }
.k6 { background: var(--c6); } .k7 { background: var(--c7); }
p.legend span { margin-right: 20px; white-space: nowrap; }
p.legend { max-width: none; font-size: 14px; color: var(--soft); margin: 8px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 10px 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
@media print { figure { break-inside: avoid; } }
"""
)
