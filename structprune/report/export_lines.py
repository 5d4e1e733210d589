"""What an export says of itself, before and after, from plain data."""

OURS = "structprune, transformers with the code beside the weights"
READERS = {
    "official": f"the family's own code, llama.cpp, {OURS}",
    "uniform": f"engines that read head_dim (llama.cpp for LLaDA), {OURS}",
    "free": OURS,
}


def plan_lines(facts: dict) -> list[str]:
    """What would be written, and why not in stricter classes: `structprune.runs.export.plan_facts`."""
    lines = [f"{facts['source']}: {facts['parameters']:,} parameters in {facts['stored']}"]
    lines += [f"not {name}: {reason}" for name, reason in facts["reasons"].items()]
    if facts["out"]:
        size = f"{facts['out_bytes'] / 1e6:.1f} MB"
        lines.append(f"Would write {facts['out']} as {facts['compat']}, {size}, for {READERS[facts['compat']]}")
    if facts["gguf"]:
        lines.append(f"Would write {facts['gguf']}, {facts['gguf_bytes'] / 1e6:.1f} MB, for llama.cpp")
    return lines


def exported_lines(facts: dict) -> list[str]:
    """What was written, and how its logits compare: `facts` of `structprune.runs.export.Exported`."""
    lines = []
    if facts["out"]:
        same = "logits are the source's, bit for bit"
        if facts["difference"]:
            share = f"{100 * facts['agreement']:.1f} % of predictions agree"
            same = f"logits differ by up to {facts['difference']:.3g}, {share}"
        lines += [
            f"{facts['compat']}, {facts['dtype']}: {same}",
            f"Wrote {facts['out']}, for {READERS[facts['compat']]}",
        ]
    if facts["gguf"]:
        lines.append(f"Wrote {facts['gguf']} ({facts['gguf_bytes'] / 1e6:.1f} MB), for llama.cpp")
    return lines
