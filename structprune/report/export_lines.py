"""What an export says of itself, before and after, from plain data."""

OURS = "structprune, transformers with the code beside the weights"
READERS = {
    "official": f"the family's own code, {OURS}",
    "uniform": f"engines that read head_dim (llama.cpp for LLaDA), {OURS}",
    "free": OURS,
}
UNPACKERS = {  # layout of packed weights -> what unpacks it
    "sparse-24-bitmask": "transformers 4.51 to 4.57 with compressed-tensors below 0.15 and accelerate",
    "sparse-bitmask": "transformers 4.51 to 4.55 with compressed-tensors below 0.15 and accelerate",
}


def plan_lines(facts: dict) -> list[str]:
    """What would be written, and why not in stricter classes: `structprune.runs.export.plan_facts`."""
    lines = [f"{facts['source']}: {facts['parameters']:,} parameters in {facts['stored']}"]
    lines += [f"not {name}: {reason}" for name, reason in facts["reasons"].items()]
    if facts["out"]:
        size = f"{facts['out_bytes'] / 1e6:.1f} MB"
        if "layout" in facts:
            lines.append(_packed(facts, "out_bytes"))
        lines.append(f"Would write {facts['out']} as {facts['compat']}, {size}, for {_readers(facts)}")
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
        lines.append(f"{facts['compat']}, {facts['dtype']}: {same}")
        if "layout" in facts:
            lines.append(f"{_packed(facts, 'written_bytes')}; each was unpacked from the file again, bit for bit")
        lines.append(f"Wrote {facts['out']}, for {_readers(facts)}")
    if facts["gguf"]:
        lines.append(f"Wrote {facts['gguf']} ({facts['gguf_bytes'] / 1e6:.1f} MB), for llama.cpp")
    return lines


def _readers(facts: dict) -> str:
    if "layout" in facts:
        return UNPACKERS[facts["layout"]]
    readers = READERS[facts["compat"]]
    return f"llama.cpp, {readers}" if facts["compat"] == "official" and facts["llama_cpp"] else readers


def _packed(facts: dict, key: str) -> str:
    """How many weights are packed, and what that makes of the bytes of all; `key` has those packed."""
    sizes = f"{facts[key] / 1e6:.1f} MB instead of {facts['plain_bytes'] / 1e6:.1f} MB"
    return f"{facts['packed']} weights packed as {facts['layout']}: {sizes}"
