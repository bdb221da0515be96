"""The table and the JSON of what was measured."""

import typing

from .groups import Group
from .results import Figures, Ratio, Requirement, Results
from .units import Unit, digits

TITLES = {"native": "native", "lodge": "Lodge", "qemu": "QEMU TCG"}
Json = dict[str, typing.Any]


def _cell(figures: Figures | None, unit: Unit) -> str:
    return f"{unit.show(figures.min)} / {unit.show(figures.median)}" if figures else "-"


def _ratio(ratio: Ratio | None) -> str:
    return f"{digits(ratio.min)}x / {digits(ratio.median)}x" if ratio else "-"


def rows(group: Group, results: Results) -> list[list[str]]:
    """Header and lines."""
    native = "native" in group.sides
    table = [[group.name, *(TITLES[side] for side in group.sides), f"{group.better} than TCG"]]
    if native:
        table[0].append("slower than native")
    for workload, unit in group.workloads.items():
        table.append([workload, *(_cell(results.figures(workload, side), unit) for side in group.sides),
                      _ratio(results.ratio(workload, "qemu", "lodge"))])  # fmt: skip
        if native:
            table[-1].append(_ratio(results.ratio(workload, "lodge", "native")))
    for name, ratios in group.derived(results).items():
        table.append([name, *(_ratio(ratios.get(side)) for side in group.sides), ""] + [""] * native)
    if group.mean:
        speed = results.mean_ratio(group.workloads, "qemu", "lodge")
        table.append(["geomean", *("" for _ in group.sides), _ratio(speed)])
        if native:
            table[-1].append(_ratio(results.mean_ratio(group.workloads, "lodge", "native")))
    return table


def align(table: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def verdict(requirement: Requirement) -> str:
    value = "not measured" if requirement.value is None else digits(requirement.value)
    met = {True: "met", False: "NOT MET", None: "-"}[requirement.met]
    return f"  {requirement.text}: {value}, required {requirement.relation} {requirement.bound:g}: {met}"


def text(group: Group, results: Results) -> str:
    parts = [align(rows(group, results))]
    parts += [verdict(requirement) for requirement in group.requirements(results)]
    parts += [f"  FAILED on {side}: {message}" for side, message in results.failures]
    parts += [f"  WRONG {message}" for message in results.disagreements()]
    return "\n".join(parts)


def _figures_json(figures: Figures, unit: Unit) -> Json:
    return {"unit": unit.name, "min": figures.min, "median": figures.median, "all": list(figures.costs)}


def _ratio_json(ratio: Ratio | None) -> Json | None:
    return ratio and {"min": ratio.min, "median": ratio.median}


def _workload_json(group: Group, results: Results, workload: str, unit: Unit) -> Json:
    out: Json = {}
    for side in group.sides:
        if figures := results.figures(workload, side):
            out[side] = _figures_json(figures, unit)
            sums = sorted({sample.checksum for sample in results.samples(workload, side)} - {""})
            if sums:
                out[side]["checksums"] = sums
    out["faster_than_tcg"] = _ratio_json(results.ratio(workload, "qemu", "lodge"))
    out["slower_than_native"] = _ratio_json(results.ratio(workload, "lodge", "native"))
    return out


def json(group: Group, results: Results) -> Json:
    out: Json = {
        "workloads": {name: _workload_json(group, results, name, unit) for name, unit in group.workloads.items()},
        "derived": {
            name: {side: _ratio_json(ratio) for side, ratio in ratios.items()}
            for name, ratios in group.derived(results).items()
        },
        "requirements": [
            {"text": wanted.text, "value": wanted.value, "relation": wanted.relation, "bound": wanted.bound,
             "met": wanted.met}
            for wanted in group.requirements(results)
        ],
        "failures": [{"side": side, "message": message} for side, message in results.failures],
        "disagreements": results.disagreements(),
    }  # fmt: skip
    if group.mean:
        out["geomean"] = {
            "faster_than_tcg": _ratio_json(results.mean_ratio(group.workloads, "qemu", "lodge")),
            "slower_than_native": _ratio_json(results.mean_ratio(group.workloads, "lodge", "native")),
        }
    return out
