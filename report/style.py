"""The page's style sheet: light and dark, without external fonts or files."""

import re

_LIGHT = """\
  --paper: #fbfaf8; --card: #ffffff; --ink: #1f2328; --soft: #62676f; --line: #e4e1dc;
  --accent: #2f6f8f; --good: #2b7a4b; --bad: #b3432b; --none: #8a8f98;
  --c1: #c2702a; --c2: #6b5fb5; --c3: #4b8a4f; --c4: #b0497d; --c5: #7d6b3c;
  --c6: #3d9a9a; --c7: #8c4a3f;
"""

_CHARTS = """\
svg text { font-size: 10px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg.bars text { font-size: 13px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round; }
svg .c1 { stroke: var(--c1); } svg .c2 { stroke: var(--c2); } svg .c3 { stroke: var(--c3); }
svg .c4 { stroke: var(--c4); } svg .c5 { stroke: var(--c5); } svg .c6 { stroke: var(--c6); }
svg .c7 { stroke: var(--c7); }
svg .faint { stroke-width: 1; opacity: 0.3; }
svg .level { stroke-width: 1; stroke-dasharray: 6 4; opacity: 0.8; }
svg .mark { stroke: var(--bad); stroke-width: 1; stroke-dasharray: 3 3; opacity: 0.7; }
svg .bar { fill: var(--accent); }
svg .rest { fill: var(--line); }
svg .p0 { fill: var(--accent); } svg .p1 { fill: var(--c1); } svg .p2 { fill: var(--c2); }
svg .p3 { fill: var(--c3); } svg .p4 { fill: var(--c4); } svg .p5 { fill: var(--c5); }
svg .p6 { fill: var(--c6); } svg .p7 { fill: var(--c7); }
"""

CSS = (
    f"""
:root {{
  color-scheme: light dark;
{_LIGHT}}}
{_CHARTS}"""
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
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 6px 0 0; }
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


def chart_file_style() -> str:
    """Style rules of a chart in a file of its own: always light, without CSS variables, which some viewers lack."""
    colours = dict(re.findall(r"--(\w+): (#\w+);", _LIGHT))
    rules = re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], _CHARTS)
    return f"svg {{ font-family: system-ui, Segoe UI, sans-serif; }}\n{rules}"
