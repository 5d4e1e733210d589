"""GGUF files in llama.cpp itself, against torch: logits, tokens of a text, and a text that both denoise.

Every checkpoint is written in every dtype to a temporary file. Needs the package llama-cpp-python in a release that
knows LLaDA and Dream, which structprune does not depend on.

    pip install llama-cpp-python
    python -m scripts.tools.check_gguf CHECKPOINT... [--dtypes f32,q8_0] [--out scripts/results/gguf.json]
"""

import ctypes
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table

from scripts.tools.script_line import OneLineParser, one_line, parse_names, result_file, show_result, write_result
from structprune.bench.machine import describe_machine
from structprune.checkpoint.export import export_class
from structprune.checkpoint.gguf_file import GGUF_TYPES, write_gguf
from structprune.errors import UserError
from structprune.models.families import family_of
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

    @torch.no_grad()
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


def measure(directory: Path, kinds: list[str], folder: Path) -> list[dict]:
    """A row for every dtype of one checkpoint."""
    model, tokenizer = load_model(directory, "float32"), load_tokenizer(directory)
    ids, rows = encode(tokenizer, TEXT), []
    for kind in kinds:
        path = write_gguf(model, folder / f"{kind}.gguf", kind)
        theirs = LlamaCpp(path, len(ids) + WRITTEN)
        row = {"checkpoint": model.source.name, "family": family_of(model.config).name, "dtype": kind}
        row |= {"class": export_class(model.config, model.source.values), "bytes": path.stat().st_size}
        rows.append(row | {"tokens_equal": theirs.tokens(TEXT) == ids} | compare(model, theirs, ids, tokenizer.decode))
        path.unlink()
    return rows


def table_of(rows: list[dict]) -> Table:
    table = Table(title="llama.cpp against torch")
    for title in ("checkpoint", "class", "dtype", "MB", "difference", "largest logit", "argmax", "text"):
        table.add_column(title, justify="left" if title in ("checkpoint", "class", "dtype") else "right")
    for row in rows:
        differences = f"{row['largest_difference']:.2g}", f"{row['largest_logit']:.0f}"
        shares = f"{row['agreement']:.1%}", f"{row['equal_tokens']:.0%}"
        name = f"{row['checkpoint']} ({row['family']})"
        table.add_row(name, row["class"], row["dtype"], f"{row['bytes'] / 1e6:.1f}", *differences, *shares)
    return table


def run(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--dtypes", default="f32", help=f"of {', '.join(GGUF_TYPES)}, commas between (default f32)")
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/gguf.json"))
    options = parser.parse_args(arguments)
    kinds = parse_names("--dtypes", options.dtypes, GGUF_TYPES)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for path in options.checkpoints for row in measure(path, kinds, Path(folder))]
    release = importlib.metadata.version("llama-cpp-python")
    settings = {"text": TEXT, "written": WRITTEN, "llama-cpp-python": release}
    write_result(options.out, {"settings": settings, "machine": describe_machine(), "rows": rows})
    show_result(table_of(rows), out=options.out, width=150)


def main(arguments: list[str] | None = None) -> int:
    return one_line("check_gguf", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
