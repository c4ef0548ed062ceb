"""Tables that a person reads at the end of a run."""

from collections.abc import Sequence
from typing import Any

from trainer.adapter_store import Adapter
from trainer.trunk import Trunk

HEAD = ["domain", "test rows", "AUC shared", "+ adapter", "change", "log loss", "+ adapter"]


def sizes(trunk: Trunk, adapters: Sequence[Adapter]) -> dict[str, int]:
    """Parameters of the trunk, those that no phase trains apart, and of the largest adapter; 4
    bytes each."""
    tables = sum(table.rows * table.width for table in trunk.tables.tables)
    dense = sum(tensor.numel() for tensor in trunk.dense.values())
    counts = [sum(t.numel() for t in adapter.tensors.values()) for adapter in adapters]
    adapter = max(counts, default=0)
    frozen = sum(tensor.numel() for tensor in trunk.method().frozen().values())
    return {"tables": tables, "dense": dense, "frozen": frozen, "adapter": adapter}


def final_table(summary: dict[str, Any]) -> str:
    """Per domain: rows, AUC and log loss of the shared part and with its adapter."""
    shared, adapted = summary["shared"], summary["adapted"]
    if adapted is None:
        return "\n".join([shared_table(shared), *_notes(summary)])
    kept = set(summary["kept"])
    after = {score["domain"]: score for score in adapted["domains"]}
    rows = [
        [
            before["domain"],
            f"{before['rows']:,}",
            *_pair(before, after[before["domain"]]),
            "kept" if before["domain"] in kept else "-",
        ]
        for before in shared["domains"]
    ]
    lines = [
        grid([*HEAD, ""], rows),
        _wauc_line(shared, adapted),
        _fate(len(kept), len(rows), summary["one_phase"]),
    ]
    lines += [f"no adapter: {reason}" for reason in summary["skipped"].values()]
    return "\n".join([*lines, *_notes(summary)])


def _fate(kept: int, domains: int, one_phase: bool) -> str:
    if one_phase:  # nothing was held against the shared part, which never stood alone
        return f"{kept} of {domains} domains have adapters, which learned with the shared part"
    return f"{kept} of {domains} adapters beat the shared part on validation rows"


def _notes(summary: dict[str, Any]) -> list[str]:
    lost = summary["corrupt_rows"].items()
    left_out = [f"corrupt, and left out: {rows:,} rows of {phase}" for phase, rows in lost]
    return [*left_out, size_line(summary["sizes"])]


def shared_table(shared: dict[str, Any]) -> str:
    """Of the shared part alone."""
    rows = [
        [one["domain"], f"{one['rows']:,}", figure(one["auc"]), f"{one['log_loss']:.4f}"]
        for one in shared["domains"]
    ]
    total = f"WAUC {figure(shared['wauc'])}; all rows: AUC {figure(shared['auc'])}"
    lines = [
        grid(["domain", "test rows", "AUC", "log loss"], rows),
        f"{total}, log loss {shared['log_loss']:.4f}{_undefined(shared)}",
    ]
    return "\n".join(lines)


def added_table(summary: dict[str, Any]) -> str:
    """What an added domain gained, and that nobody else moved."""
    before, after = summary["shared"]["domains"][0], summary["adapted"]["domains"][0]
    rows = [
        ["shared part alone", figure(before["auc"]), f"{before['log_loss']:.4f}"],
        ["with its adapter", figure(after["auc"]), f"{after['log_loss']:.4f}"],
    ]
    own = ", ".join(f"{key} {count:,}" for key, count in summary["own_ids"].items())
    verdict = "the trunk, the other adapters and all their predictions are bit-equal"
    return "\n".join(
        [
            grid([f"{summary['domain']} ({before['rows']:,} test rows)", "AUC", "log loss"], rows),
            f"trained in {summary['seconds']:.1f} s; kept: {'yes' if summary['kept'] else 'no'}"
            + (f"; rows of its own: {own}" if own else ""),
            f"{summary['others']} other adapters: "
            + (f"MOVED: {', '.join(summary['moved'])}" if summary["moved"] else verdict),
            *_notes(summary),
        ]
    )


def scores_table(shared: dict[str, Any], adapted: dict[str, Any]) -> str:
    """Two `Scores.to_dict()` of the same rows side by side."""
    after = {score["domain"]: score for score in adapted["domains"]}
    rows = [
        [score["domain"], f"{score['rows']:,}", *_pair(score, after[score["domain"]])]
        for score in shared["domains"]
    ]
    return f"{grid(HEAD, rows)}\n{_wauc_line(shared, adapted)}"


def _wauc_line(shared: dict[str, Any], adapted: dict[str, Any]) -> str:
    before, after = shared["wauc"], adapted["wauc"]
    line = f"WAUC {figure(before)} shared, {figure(after)} with adapters"
    line += f" ({change(before, after)})" if before is not None else ""
    return line + _undefined(shared)


def _undefined(shared: dict[str, Any]) -> str:
    if not shared["undefined"]:
        return ""
    return f"; {shared['undefined']} domains have one class in these rows: no AUC, not in WAUC"


def _pair(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        figure(before["auc"]),
        figure(after["auc"]),
        change(before["auc"], after["auc"]),
        f"{before['log_loss']:.4f}",
        f"{after['log_loss']:.4f}",
    ]


def size_line(counts: dict[str, int]) -> str:
    """`sizes` in words."""
    trunk, adapter = counts["tables"] + counts["dense"] + counts["frozen"], counts["adapter"]
    line = f"trunk {trunk:,} parameters ({4 * trunk:,} bytes; {counts['tables']:,} in tables"
    line += f", {counts['frozen']:,} frozen)" if counts["frozen"] else ")"
    if adapter:
        line += f", largest adapter {adapter:,} ({4 * adapter:,} bytes, {adapter / trunk:.2%})"
    return line


def figure(value: float | None) -> str:
    """Four digits, or that there is none."""
    return "undefined" if value is None else f"{value:.4f}"


def change(before: float | None, after: float | None) -> str:
    """With its sign; empty where one of them is undefined."""
    return "" if before is None or after is None else f"{after - before:+.4f}"


def grid(head: list[str], rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(head), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])
