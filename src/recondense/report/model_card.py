"""The README.md of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recondense.full_disk import format_bytes
from recondense.report.tables import disk_line, format_number, plan_line, recovery_words


def model_card(summary: Mapping[str, Any]) -> str:
    """Return the text of an exported folder's README.md, with the run's figures."""
    stages = summary["stages"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [mixture-of-experts, compression, recondense]",
        "---",
        "",
        f"# {summary['model']}, {summary['method']}, recovery {recovery_words(summary)}",
        "",
        f"Compressed by recondense: {plan_line(summary.get('operations', {}))}. `plan.json` lists all operations.",
        "",
        "| | " + " | ".join(stages) + " |",
        "|---|" + "---:|" * len(stages),
    ]
    rows = (
        ("perplexity", ("perplexity",), format_number),
        ("KL to original", ("kl_to_original",), format_number),
        ("weights", ("profile", "weights_bytes"), format_bytes),
        ("prefill tokens/s", ("profile", "prefill_tokens_per_second"), format_number),
        ("decode tokens/s", ("profile", "decode_tokens_per_second"), format_number),
    )
    for title, (key, *rest), form in rows:
        values = [stage.get(key) if not rest else stage.get(key, {}).get(rest[0]) for stage in stages.values()]
        if any(value is not None for value in values):
            lines.append(f"| {title} | " + " | ".join("" if v is None else form(v) for v in values) + " |")
    lines += ["", *(f"- {name}: {value:z.4f}" for name, value in summary["ratios"].items()), ""]
    if "bytes_on_disk" in summary:
        lines += [f"{disk_line(summary)}.", ""]
    return "\n".join(lines)
