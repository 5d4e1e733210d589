"""What check_gguf does without llama.cpp: the order of denoising, the comparison, and its one line."""

import sys

import pytest
import torch

from structprune import load_model


@pytest.fixture
def check(scripts):
    return scripts("check_gguf")


def test_the_surest_token_is_revealed_first(check):
    """Masks at 1 and 3: token 2 at 3 is surer than token 1 at 1, which then sees it and becomes 0."""
    seen = []

    def logits(ids):
        seen.append(ids.tolist())
        scores = torch.zeros(4, 6)
        scores[1, 0 if ids[3] == 2 else 1], scores[3, 2], scores[:, 5] = 2.0, 4.0, 9.0
        return scores

    assert check.denoise(logits, torch.tensor([3, 5, 3, 5]), 5, shifted=False).tolist() == [3, 0, 3, 2]
    assert seen == [[3, 5, 3, 5], [3, 5, 3, 2]]


def test_shifted_logits_are_of_the_next_token(check):
    scores = torch.zeros(3, 4)
    scores[1, 2] = 5.0  # of position 2
    assert check.denoise(lambda ids: scores, torch.tensor([1, 1, 3]), 3, shifted=True).tolist() == [1, 1, 2]


def test_torch_against_itself_agrees(check, tiny_checkpoint):
    model = load_model(tiny_checkpoint())

    @torch.no_grad()
    def theirs(ids):
        return model(ids[None]).logits[0] + torch.tensor(0.5)

    figures = check.compare(model, theirs, [1, 2, 3], decode=str)
    assert figures["largest_difference"] == pytest.approx(0.5, abs=1e-5)
    assert figures["agreement"] == figures["equal_tokens"] == 1.0 and figures["text"] == figures["text_of_torch"]


def test_without_llama_cpp(check, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    out = ["--out", str(tmp_path / "x.json")]
    assert check.main([str(tiny_checkpoint()), *out]) == 2
    assert "check_gguf needs llama.cpp: pip install llama-cpp-python" in capsys.readouterr().err
    assert check.main([str(tmp_path), "--dtypes", "f32,q2", *out]) == 2
    assert "--dtypes 'q2': give f32, f16, bf16, q8_0" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
