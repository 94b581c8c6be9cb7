"""The final table: this checkpoint beside the paper's reported rows."""

from typing import Dict, List

from reported import REPORTED


def table(results: List[Dict], name: str, size: str) -> str:
    """One line per suite, and below it why a suite has no score, what could not be parsed, and where files are."""
    rows = [("suite", name, f"LLaVA-1.5-{size.upper()}", "+ MMFuser")]
    notes = []
    for result in results:
        before, after = REPORTED[size][result["suite"]]
        falls = " (falls)" if after < before else ""
        rows.append((result["title"], _cell(result), f"{before:g}", f"{after:g}{falls}"))
        if "padded" in result:
            rows.append((f"{result['title']}, padded square", f"{result['padded']:.1f}", "", ""))
        notes += [f"{result['title']}: {note}" for note in result["notes"]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += ["", "The last two columns are the paper's (arXiv 2410.11829), not measured here."]
    return "\n".join(lines + notes)


def _cell(result: Dict) -> str:
    if result["status"] != "scored":
        return {"upload": "upload", "missing": "missing", "failed": "FAILED"}[result["status"]]
    return f"{result['score']:g}" if result["suite"] == "ocrbench" else f"{result['score']:.1f}"
