"""A GGUF file in llama.cpp itself, against torch: logits, tokens of a text, and a text that both denoise.

Needs the package llama-cpp-python in a release that knows LLaDA and Dream (0.3.16 or later), which structprune does not
depend on.

    structprune export CHECKPOINT --gguf model.gguf --dtype f32
    python -m scripts.tools.check_gguf CHECKPOINT model.gguf [--out gguf.json]
"""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from scripts.tools.script_line import OneLineParser, one_line, result_file, write_result
from structprune.bench.machine import describe_machine
from structprune.errors import UserError
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.tokenizer import encode, load_tokenizer

TEXT = "The quick brown fox doesn't jump over 1234 lazy dogs.\n\nIt sleeps, \u00e9tendu."
WRITTEN = 32  # tokens that are denoised after TEXT
Logits = Callable[[torch.Tensor], torch.Tensor]  # (T,) ids -> (T, V), at position i those of token i


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, with room for `length` tokens.

    Raises:
        UserError: llama-cpp-python is missing, or llama.cpp refuses the file.
    """

    def __init__(self, path: Path, length: int):
        try:
            import llama_cpp
        except ImportError as error:
            raise UserError("check_gguf needs llama.cpp: pip install llama-cpp-python") from error
        self._api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise UserError(f"llama.cpp cannot load '{path}': export it again")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.rows = llama_cpp.llama_vocab_n_tokens(self._vocabulary)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits as they come, of ids (T,): (T, V)."""
        api, count = self._api, len(ids)
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for place, token in enumerate(ids.tolist()):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if api.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        rows = [api.llama_get_logits_ith(self._context, place)[: self.rows] for place in range(count)]
        api.llama_batch_free(batch)
        return torch.tensor(rows)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, special ones read as text."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = self._api.llama_tokenize(self._vocabulary, raw, len(raw), room, len(room), False, False)
        return list(room[:count])


def denoise(logits: Logits, ids: torch.Tensor, mask_id: int, shifted: bool) -> torch.Tensor:
    """Reveal the masked tokens of ids (T,) one by one, the surest first."""
    ids = ids.clone()
    while (masked := ids == mask_id).any():
        scores = logits(ids)  # (T, V)
        scores = torch.cat((scores[:1], scores[:-1])) if shifted else scores
        scores[:, mask_id] = -torch.inf
        sure, tokens = scores.softmax(-1).max(-1)  # (T,), (T,)
        place = int(sure.masked_fill(~masked, -1).argmax())
        ids[place] = tokens[place]
    return ids


def compare(model: DiffusionLM, theirs: LlamaCpp, ids: list[int], decode: Callable) -> dict:
    """Logits and denoised text of both, after the tokens of a text."""
    mask_id = model.config.mask_token_id
    start = torch.tensor(ids + [mask_id] * WRITTEN)  # (T,)

    @torch.inference_mode()
    def ours(values: torch.Tensor) -> torch.Tensor:
        return model(values[None]).logits[0].float()  # (T, V)

    one, other = ours(start), theirs(start)
    texts = [denoise(each, start, mask_id, model.shifted)[len(ids) :].tolist() for each in (ours, theirs)]
    return {
        "largest_difference": (one - other).abs().max().item(),
        "largest_logit": one.abs().max().item(),
        "agreement": (one.argmax(-1) == other.argmax(-1)).float().mean().item(),
        "equal_tokens": sum(a == b for a, b in zip(*texts)) / WRITTEN,
        "text": decode(texts[1]),
        "text_of_torch": decode(texts[0]),
    }


def run(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=result_file, help="write the figures there")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.checkpoint, "float32"), load_tokenizer(options.checkpoint)
    ids = encode(tokenizer, TEXT)
    theirs = LlamaCpp(options.file, len(ids) + WRITTEN)
    figures = {"tokens_equal": theirs.tokens(TEXT) == ids} | compare(model, theirs, ids, tokenizer.decode)
    for name, value in figures.items():
        print(f"{name}: {value!r}")
    if options.out:
        facts = {"checkpoint": options.checkpoint.name, "file": options.file.name, "machine": describe_machine()}
        write_result(options.out, facts | figures)


def main(arguments: list[str] | None = None) -> int:
    return one_line("check_gguf", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
