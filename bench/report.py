"""The results file as text: the table of bench/README.md, the README's short one, or every variant of every case.

    python bench/report.py results.json                      print the table
    python bench/report.py results.json --short              print the short one
    python bench/report.py results.json --picture FILE.png   its first job as bars: time and memory
    python bench/report.py results.json --details            print every variant
    python bench/report.py results.json --update FILE        rewrite that table between its markers
    python bench/report.py results.json --plots FOLDER       PNGs: time and memory against size, roofline
    python bench/report.py results.json --html page.html     table and plots on a page that stands alone

Needs nothing but Python, plots and pages matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.results import label, merged, results_file, size

BEGIN = "<!-- benchmarks: written by bench/report.py -->"
END = "<!-- end of benchmarks -->"
DEVICE_BEGIN = "<!-- device benchmarks: written by bench/report.py -->"
DEVICE_END = "<!-- end of device benchmarks -->"
"""Results of an accelerator have a place of their own."""
SHORT_BEGIN = "<!-- short benchmarks: written by bench/report.py -->"
SHORT_END = "<!-- end of short benchmarks -->"
"""And so has the README's extract."""

_TITLES = {
    ("logps", "forward"): "log-probs, forward",
    ("logps", "backward"): "log-probs, backward",
    ("logps", "both"): "log-probs, forward + backward",
    ("dpo", "forward"): "DPO loss from logits",
    ("dpo", "both"): "DPO loss + gradient from logits",
    ("ppo", "both"): "PPO-clip loss + gradient from logits",
    ("isa", "both"): "log-probs, forward + backward, by instruction set",
}


# -------------------------------------------------------------------------------------------------------- single cells
def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    unit = next((unit for unit, scale in units.items() if seconds >= scale), "µs")
    value = seconds / units[unit]
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def _spread(row: dict[str, Any]) -> str:
    return f"{duration(row['median'])} ({duration(row['p10'])} to {duration(row['p90'])})"


def _times(ratio: dict[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.3g}x"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.3g} %"


def _peak(case: dict[str, Any], row: dict[str, Any]) -> str:
    peak = row.get("peak_bytes")
    return _percent(None if peak is None else peak / case["logits_bytes"])


def _error(case: dict[str, Any], row: dict[str, Any]) -> str:
    kinds = ("output",) if case["job"] == "forward" else ("gradient", "weight", "hidden")
    errors = [row.get("error", {}).get(kind) for kind in kinds]
    return next((f"{error:.1e}" for error in errors if error is not None), "-")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ------------------------------------------------------------------------------------------------------- whole reports
def _measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases whose times stand beside a limit."""
    return [case for case in results["cases"] if "probes" in case]


def _rounds(results: dict[str, Any]) -> str:
    """How many rounds the cases had: merged runs may differ."""
    counts = {len(row["seconds"]) for case in _measured(results) for row in case["variants"].values()}
    low, high = (min(counts), max(counts)) if counts else (results["environment"]["options"]["rounds"],) * 2
    return str(low) if low == high else f"{low} to {high}"


def machine(results: dict[str, Any]) -> str:
    """Where, when and with what the results were taken, in one line."""
    env = results["environment"]
    commit = f"commit {env['commit'][:12]}" if env["commit"] else "no commit"
    commit += " with uncommitted changes" if env["dirty"] else ""
    isa = f"{env['isa']} kernels" if env["isa"] else "no compiled kernels"
    where = f"{env['cpu']}, {env['threads']} threads, {isa}"
    if env.get("accelerator"):
        where = f"{env['accelerator']['name']}, CUDA {env['accelerator']['cuda']}"
    peers = {"trl": "TRL", "liger-kernel": "Liger"}
    named = "".join(f", {peers[name]} {v}" for name, v in env["versions"].items() if v and name in peers)
    return (
        f"{where} (backend `{env['backend']}`), torch {env['versions']['torch']}{named}, {env['date'][:10]}, {commit}, "
        f"{_rounds(results)} rounds"
    )


def _rates(results: dict[str, Any]) -> str:
    def span(probe: str) -> str:
        rates = [case["probes"][probe]["rate"] / 1e9 for case in _measured(results) if probe in case["probes"]]
        return f"{min(rates):.1f} to {max(rates):.1f} GB/s"

    if not any("read" in case["probes"] for case in _measured(results)):
        return ""
    return f"Measured in the same rounds: reading {span('read')}, copying {span('copy')} (bytes read and written)."


def _overhead(results: dict[str, Any]) -> list[str]:
    return [
        f"A call of `token_stats` with autograd's recording takes {duration(case['variants']['fastalign']['median'])} "
        f"at {case['rows']} x {case['vocab']}, {duration(case['checks']['overhead_seconds'])} more than its kernel "
        f"alone; eager `log_softmax` + `gather` takes {duration(case['variants']['eager']['median'])}."
        for case in results["cases"]
        if "overhead_seconds" in case["checks"]
    ]


def _advantages(results: dict[str, Any]) -> list[str]:
    return [
        f"Generalised advantage estimation, {case['rows']} sequences of {case['vocab']:,} tokens: "
        f"{_spread(case['variants']['fastalign'])}; a loop of tensor operations over time takes "
        f"{_times(case['ratios']['fastalign']['eager'])} as long."
        for case in results["cases"]
        if case["suite"] == "gae" and {"fastalign", "eager"} <= case["variants"].keys()
    ]


_NOTES = (
    "Times: median (10th to 90th percentile) of rounds that visit every variant once in random order. `2.0x`: the peer"
    " takes twice as long, median of the ratios within rounds. Of the limit: the time that the bytes that must be "
    "moved (forward: the logits read once; backward: the logits read and the gradient written) take at the measured "
    "rates, over the time taken; of a fused head, the bare matrix products. Peak: memory beyond the logits, as a share"
    " of them; eager's in brackets. Error against float64: of the result (forward: largest, absolute) or of the "
    "gradient (norm of the error over norm), eager's in brackets."
)
_IDLE_NOTES = " Times of a device whose queue was empty: what Python and launches take of the host is in them."
_HOST_NOTES = (
    " Times are the device's own, its queue being full as it is in training; host: what Python and launches take of "
    "the host for one call, eager's in brackets."
)


def _host(row: dict[str, Any]) -> str:
    return duration(row["host_seconds"]) if row.get("host_seconds") else "-"


def table(results: dict[str, Any]) -> str:
    """The block of bench/README.md, markers not included: one line per case and variant of ours."""
    cases = _measured(results)
    peers = list(dict.fromkeys(name for c in cases for name, row in c["variants"].items() if not row["ours"]))
    on_device = any("host_seconds" in row for case in cases for row in case["variants"].values())
    head = ["job", "logits", "variant", "time", "of the limit", *peers, "peak", "error", *["host"] * on_device]
    lines = [_line(head), _line(["---"] * 3 + ["---:"] * (len(head) - 3))]
    for case in cases:
        eager = case["variants"].get("eager", {})
        for ours, ratios in case["ratios"].items():
            row = case["variants"][ours]
            lines.append(
                _line(
                    [
                        _TITLES.get((case["suite"], case["job"]), f"{case['suite']} {case['job']}"),
                        size(case),
                        ours.removeprefix("fastalign").strip(),
                        _spread(row),
                        _percent(row.get("of_limit")),
                        *(_times(ratios.get(peer)) for peer in peers),
                        f"{_peak(case, row)} ({_peak(case, eager)})",
                        f"{_error(case, row)} ({_error(case, eager)})",
                        *[f"{_host(row)} ({_host(eager)})"] * on_device,
                    ]
                )
            )
    parts = [machine(results)]
    if cases:
        more = _HOST_NOTES if on_device else _IDLE_NOTES if results["environment"].get("accelerator") else ""
        parts += ["\n".join(lines), *filter(None, [_rates(results)]), _NOTES + more]
    return "\n\n".join(parts + _advantages(results) + _overhead(results))


def _largest(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Forward and backward together at the largest vocabulary."""
    cases = [case for case in _measured(results) if case["job"] == "both" and "fastalign" in case["ratios"]]
    most = max((case["vocab"] for case in cases), default=0)
    return [case for case in cases if case["vocab"] == most]


def short(results: dict[str, Any]) -> str:
    """The README's block: one line per case."""
    cases = _largest(results)
    peers = list(dict.fromkeys(peer for case in cases for peer in case["ratios"]["fastalign"]))
    head = ["", "logits", "time", *peers]
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for case in cases:
        title = _TITLES.get((case["suite"], case["job"]), f"{case['suite']} {case['job']}")
        times = (_times(case["ratios"]["fastalign"].get(peer)) for peer in peers)
        lines.append(_line([title, size(case), duration(case["variants"]["fastalign"]["median"]), *times]))
    return f"{machine(results)}; `2.0x`: the peer takes twice as long.\n\n" + "\n".join(lines)


def details(results: dict[str, Any]) -> str:
    """Every variant of every case: time, rate, share of the limit, peak memory, error."""
    blocks = [machine(results)]
    for case in results["cases"]:
        head = label(case)
        for name, probe in case.get("probes", {}).items():
            head += f", {name} {probe['rate'] / 1e9:.1f} {probe.get('unit', 'GB/s')}"
        lines = [head]
        for name, row in sorted(case["variants"].items(), key=lambda item: item[1]["median"]):
            line = f"  {name:<26}{_spread(row):<34}"
            if "probes" in case:
                line += f"{row['rate'] / 1e9:6.1f} GB/s" if "rate" in row else " " * 11
                line += f"  limit {_percent(row.get('of_limit')):>7}"
                line += f"  peak {_peak(case, row):>7}  error {_error(case, row)}"
                line += f"  host {_host(row)}" if "host_seconds" in row else ""
            for ours, ratios in case["ratios"].items():
                if name in ratios:
                    line += f"  {_times(ratios[name])} {ours}"
            lines.append(line)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def update(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """The text with what stands between the markers replaced. ValueError unless each marker is there once, in order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file must hold {begin!r} once and, after it, {end!r} once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", type=results_file, nargs="+", help="JSON written by `pytest bench --json`; later cases win"
    )
    parser.add_argument("--details", action="store_true", help="every variant instead of the table")
    parser.add_argument("--short", action="store_true", help="the README's extract instead of the table")
    parser.add_argument("--update", type=Path, metavar="FILE", help="rewrite the table between this file's markers")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write plots as PNG into this folder")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the README's picture to this PNG")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write table and plots to this file")
    arguments = parser.parse_args()
    results = merged(arguments.results)
    if arguments.update:
        text = arguments.update.read_text(encoding="utf-8")
        markers = (DEVICE_BEGIN, DEVICE_END) if results["environment"].get("accelerator") else (BEGIN, END)
        markers = (SHORT_BEGIN, SHORT_END) if arguments.short else markers
        block = short(results) if arguments.short else table(results)
        arguments.update.write_text(update(text, block, *markers), encoding="utf-8")
    elif arguments.picture:
        _picture(results, arguments.picture)
    elif arguments.plots or arguments.html:
        _draw(results, arguments.plots, arguments.html)
    else:
        print(details(results) if arguments.details else short(results) if arguments.short else table(results))


def _picture(results: dict[str, Any], path: Path) -> None:
    import plots  # needs matplotlib

    cases = [case for case in _largest(results) if case["suite"] == "dpo"]
    job = _TITLES["dpo", "both"]
    title = f"{job}, {cases[0]['rows']:,} x {cases[0]['vocab']:,}; {results['environment']['cpu']}"
    path.write_bytes(plots.overview(cases, f"{title}, {results['environment']['threads']} threads"))


def _draw(results: dict[str, Any], folder: Path | None, page: Path | None) -> None:
    import plots  # needs matplotlib

    images = plots.plots(results)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in images.items():
            (folder / name).write_bytes(png)
    if page is not None:
        page.write_text(plots.page(table(results), images), encoding="utf-8")
    print(f"{', '.join(images) or 'nothing'} drawn to {' and '.join(str(p) for p in (folder, page) if p)}")


if __name__ == "__main__":
    main()
