"""One measured pruning call of the paper authors' release, for bench_masking.py; run by that script, not by hand.

    python published_worker.py RELEASE REQUEST.json

Runs in the environment of the release, so it imports torch, safetensors and what the release imports, but never
structprune. The release is called unchanged, in fp32 on CPU; only its inputs are replaced: calibration windows and
noisy copies are read from a file, so that both sides see the same ids. masking_worker.py also uses `Request` and
`measure`.
"""

import contextlib
import ctypes
import gc
import json
import re
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CALLS = {
    "wanda": "prune_wanda",
    "sink-wanda": "prune_sink",
    "sparsegpt": "prune_sparsegpt",
    "sink-sparsegpt": "prune_sink_sparsegpt",
}
WANDA_WINDOWS = 128  # its Wanda allocates hidden states for this many windows, however few it gets


@dataclass(frozen=True)
class Request:
    """The task of one worker.

    Attributes:
        checkpoint: directory in LLaDA's layout. data: safetensors with `ids` (N, T) and `noisy` (N, S, T).
        method: a key of `CALLS`. ratio: share of every linear's weights to remove.
        steps, interval: the noise schedule, S = steps / interval levels. threads: of torch.
        out: file for the pruned linears' weights; None for no file.
    """

    checkpoint: str
    data: str
    method: str
    ratio: float
    steps: int
    interval: int
    threads: int
    out: str | None = None

    @classmethod
    def read(cls, path: str) -> "Request":
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def resident() -> tuple[int, int]:
    """Resident bytes of this process now, and at their peak since the last reset (Linux only)."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    now, peak = (1024 * int(re.findall(rf"{key}:\s+(\d+) kB", text)[0]) for key in ("VmRSS", "VmHWM"))
    return now, peak


def reset_peak() -> bool:
    """Reset the peak; False if the system does not allow it, so that an older peak would be counted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(call, model, warm_up) -> dict:
    """Seconds of `call()` and its peak resident bytes above the loaded model, after an untimed `warm_up()`.

    The bytes are None if the peak cannot be reset.
    """
    with torch.no_grad():
        for parameter in model.parameters():  # off the mapped file, whose pages stay when a weight is replaced
            parameter.data = parameter.data.clone()
        for _ in range(2):
            warm_up()
    gc.collect()
    with contextlib.suppress(
        OSError, AttributeError
    ):  # glibc only: memory freed by the warm-up would hide the call's needs
        ctypes.CDLL(None).malloc_trim(0)
    resettable = reset_peak()
    before, _ = resident()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": max(0, resident()[1] - before) if resettable else None}


def linear_weights(blocks) -> dict[str, torch.Tensor]:
    """Weights of the linears of all blocks, `{block}.{name}` -> (O, C)."""
    weights = {}
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                weights[f"{index}.{name}"] = module.weight.detach().contiguous()
    return weights


def finish(figures: dict, blocks, out: str | None) -> None:
    """Save the linears if `out` is given, and print the figures as the last line."""
    if out:
        save_file(linear_weights(blocks), out)
    print(json.dumps(figures), flush=True)


def call_release(release: str, request: Request):
    """The release's model with the request's weights, and its pruning call with the request's inputs."""
    sys.path.insert(0, release)
    import lib.prune_llada as published
    from model import LLaDAModelLM

    model = LLaDAModelLM.from_pretrained(request.checkpoint, torch_dtype=torch.float32).eval()
    data = load_file(request.data)
    ids, noisy = data["ids"], data["noisy"]  # (N, T), (N, S, T)
    model.seqlen, model.hf_device_map = ids.shape[1], {}
    copies = (copy[None] for copy in noisy.flatten(0, 1))  # (1, T) in the order of its calls: by window, then by level
    published.get_loaders = lambda *args, **kwargs: ([(row[None], row[None]) for row in ids], None)
    published._forward_diffusion = lambda *args: next(copies)
    for name in ("synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *args: None)
    args = Namespace(
        nsamples=len(ids), seed=0, sparsity_ratio=request.ratio, use_variant=False, batch_size=1, noise_eps=1e-3,
        diffusion_steps=request.steps, sample_interval=request.interval, sink_std=2.0, sink_alpha=5.0,
    )  # fmt: skip
    prune, tokenizer = getattr(published, CALLS[request.method]), Namespace(mask_token_id=model.config.mask_token_id)
    return model, ids, lambda: prune(args, model, tokenizer, torch.device("cpu"))


def main(release: str, request: Request) -> None:
    torch.set_num_threads(request.threads)
    with contextlib.redirect_stdout(sys.stderr):  # its progress would mix with ours on stdout
        model, ids, call = call_release(release, request)
        figures = measure(call, model, lambda: model(ids[:1]))
    finish(figures, model.model.transformer.blocks, request.out)


if __name__ == "__main__":
    main(sys.argv[1], Request.read(sys.argv[2]))
