"""A run's state in words, shared by terminal and page."""

from __future__ import annotations

from report.charts import short
from report.watch.run import Run

MAX_S = 1e10  # three centuries
STATE_WORDS = {
    "waiting": "started, nothing logged yet",
    "running": "running",
    "silent": "silent",
    "stopped": "stopped",
    "finished": "finished",
}


def state_text(run: Run, now_s: float) -> str:
    """The state in words, such as `running, last line 12 s ago`."""
    state = run.state(now_s)
    age = duration(now_s - run.last_line_s)
    if state == "silent":
        return f"silent for {age}: dead, or waiting for something"
    if state == "running":
        return f"running, last line {age} ago"
    return f"{STATE_WORDS[state]} {age} ago" if state != "waiting" else STATE_WORDS[state]


def progress(run: Run) -> str:
    """The progress in words, such as `1,200 of 5,000 (24%)`."""
    total = run.num_steps
    return f"{run.step:,} of {total:,} ({run.step / total:.0%})" if total else f"{run.step:,}"


def facts(run: Run, now_s: float) -> list[tuple[str, str]]:
    """(name, value) of everything that the folder tells now; unknown facts are left out."""
    found = [("step", progress(run))]
    last = run.training.last()
    if run.state(now_s) == "running" and (eta_s := run.eta_s()) is not None:
        found.append(("ETA", duration(eta_s)))
    if (loss := last.get("loss")) is not None:
        found.append(("loss", f"{loss:.4f}"))
    found += [(name, value) for name, value in (rates(run), memory(run)) if value]
    if (mfu := run.recent("mfu")) is not None:
        found.append(("MFU", f"{mfu:.1%}"))
    if (utilization := run.recent("system/gpu_utilization")) is not None:
        found.append(("GPU", f"{utilization:.0%} busy"))
    if (disk_gib := last.get("system/disk_free_gib")) is not None:
        found.append(("disk", f"{short(round(disk_gib, 1))} GiB free"))
    if checkpoint := run.last("checkpoint"):
        found.append(("checkpoint", f"step {checkpoint.step:,}, {duration(now_s - checkpoint.time_s)} ago"))
    return found + trouble(run)


def rates(run: Run) -> tuple[str, str]:
    """Steps, samples and tokens a second, averaged over the last lines."""
    parts = []
    if pace := run.step_s():
        parts.append(f"{short(pace)} s a step" if pace >= 1 else f"{1 / pace:.1f} steps/s")
    units = [("samples_per_s", "samples/s")]
    if run.recent("tokens_per_s") != run.recent("samples_per_s"):  # images count as both
        units.append(("tokens_per_s", "tokens/s"))
    for metric, unit in units:
        if value := run.recent(metric):
            parts.append(f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}")
    return ("rate", ", ".join(parts))


def memory(run: Run) -> tuple[str, str]:
    """Highest memory use among the ranks in the last interval."""
    value = run.training.last().get("memory_gib")
    return ("memory", f"{value:.1f} GiB" if value is not None else "")


def trouble(run: Run) -> list[tuple[str, str]]:
    """Counts of what went wrong; empty if nothing did."""
    nonfinite = max(run.count("nonfinite"), int(run.training.last().get("nonfinite_steps") or 0))
    counts = (
        ("alarms", run.count("alarm")),
        ("non-finite steps", nonfinite),
        ("spikes", run.count("spike")),
        ("roll-backs", run.count("roll_back")),
        ("resumed", run.count("resume")),
        ("errors", run.count("error")),
    )
    return [(name, str(count)) for name, count in counts if count]


def duration(seconds: float) -> str:
    """The duration in words: `12 s`, `3 min`, `2 h 05 min`, `3 d 4 h`."""
    if not seconds < MAX_S:  # what no log can mean
        return "–"
    whole = int(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
