"""Items scored: estimates by hand, common noise, independence of the batch, early stops, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from structprune.errors import UserError
from structprune.evaluation import choices
from structprune.evaluation.choices import Answer, Item, MonteCarlo, score_items
from structprune.evaluation.forecast import complete
from structprune.evaluation.perturb import FORMS, aligned_columns, draw_uniform, item_generator
from structprune.models.encode import Batches
from structprune.models.families import family_named

MASK = 2047
GUIDED = {"llada": 0.5, "dream": 1.5}  # u + 1.5 (c - u) in both


def make_items(seed: int = 0) -> list[Item]:
    """Two, three and one answers, of 2 to 6 tokens, after prompts of 4, 0 and 6."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda count: torch.randint(0, 2000, (count,), generator=generator)  # noqa: E731
    prompts = [ids(4), ids(0), ids(6)]
    lengths = [(4, 6), (5, 5, 3), (2,)]
    return [
        Item(f"task/{index}", tuple(Answer(prompt, ids(length), 3 * length) for length in of_item))
        for index, (prompt, of_item) in enumerate(zip(prompts, lengths, strict=True))
    ]


def sample_nats(model, answer: Answer, masked: torch.Tensor, scale: float, of: torch.Tensor | None = None) -> float:
    """Cross-entropy summed over the masked tokens of a target (or those of `of`), from full forward passes."""
    of = masked if of is None else of
    prompt, target = answer.prompt, answer.target
    noisy = torch.cat((prompt, target.masked_fill(masked, MASK)))
    logits = model(noisy[None]).logits[0]  # (T, V)
    if scale:
        bare = torch.cat((torch.full_like(prompt, MASK), noisy[len(prompt) :]))
        without = model(bare[None]).logits[0]  # (T, V)
        logits = without + (1 + scale) * (logits - without)
    shifted = torch.cat((logits[:1], logits[:-1])) if model.shifted else logits  # (T, V)
    return F.cross_entropy(shifted[len(prompt) :][of], target[of], reduction="sum").item()


def block_means(model, item: Item, settings: MonteCarlo, family: str) -> list[torch.Tensor]:
    """Per answer (K,) the means of every block's samples of the item's stream, by hand."""
    form = FORMS[family_named(family).likelihood]
    columns, width = aligned_columns([answer.target for answer in item.answers])
    uniform = (settings.samples, settings.block, width, settings.sampling, item_generator(settings.seed, item.key))
    levels, positions = draw_uniform(form, *uniform)
    result = []
    for answer, own in zip(item.answers, columns, strict=True):
        samples = form.perturb(levels, positions[:, own])
        scale = form.guidance(settings.cfg_scale)
        nats = torch.tensor([sample_nats(model, answer, mask, scale) for mask in samples.masked]).double()
        result.append(-(nats * samples.weight).view(-1, settings.block).mean(1))
    return result


@pytest.mark.parametrize("sampling", ["stratified", "published"])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.inference_mode()
def test_estimates_and_errors_by_hand(tiny_model, family, cfg, sampling):
    model, items = tiny_model(family), make_items()
    settings = MonteCarlo(16, 4, cfg_scale=GUIDED[family] if cfg else 0.0, seed=3, sampling=sampling)
    result = score_items(model, items[:2], settings, Batches(60))
    for item, scored in zip(items[:2], result, strict=True):
        blocks = block_means(model, item, settings, family)
        assert scored.key == item.key and scored.samples == 16
        assert scored.log_likelihoods == pytest.approx([each.mean().item() for each in blocks], rel=1e-4)
        assert scored.errors == pytest.approx([(each.std() / 2).item() for each in blocks], rel=1e-3)  # √4 blocks


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_numbers_do_not_depend_on_batch_or_company(tiny_model, family):
    model, items = tiny_model(family), make_items()
    settings = MonteCarlo(32, 8, cfg_scale=GUIDED[family], adaptive=True, confidence=0.6)
    expected = score_items(model, items, settings, Batches(1000))
    assert {each.samples for each in expected} != {32}  # some stop early
    for order, tokens in (([0, 1, 2], 1), ([2, 0, 1], 45), ([1, 2, 0], 10_000)):
        for index, scored in zip(
            order, score_items(model, [items[i] for i in order], settings, Batches(tokens)), strict=True
        ):
            assert scored.key == expected[index].key and scored.samples == expected[index].samples
            assert scored.log_likelihoods == pytest.approx(expected[index].log_likelihoods, rel=1e-5)
            assert scored.errors == pytest.approx(expected[index].errors, rel=1e-3)
    (alone,) = score_items(model, items[1:2], settings, Batches(77))
    assert alone.log_likelihoods == pytest.approx(expected[1].log_likelihoods, rel=1e-5)


@pytest.mark.parametrize("family, tokens", [("llada", 1), ("dream", 2)])
def test_one_maskable_token_needs_one_sample(tiny_model, family, tokens):
    """The mean of CE / p over all masks is then CE: exact, of one row."""
    model, prompt = tiny_model(family), torch.arange(5)
    answers = tuple(Answer(prompt, torch.tensor(ids[:tokens]), 1) for ids in ([7, 9], [8, 9]))
    rows = []
    model.embedding.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    (result,) = score_items(model, [Item("a", answers)], MonteCarlo(), Batches(10_000))
    assert sum(rows) == 1  # both answers masked are one sequence
    assert result.samples == 1 and result.errors == (0, 0)
    mask = torch.tensor([True, False][:tokens])
    with torch.no_grad():
        expected = [-sample_nats(model, answer, mask, 0) for answer in answers]
    assert result.log_likelihoods == pytest.approx(expected, rel=1e-5)


def test_dreams_noise_as_published_is_kept_for_one_token(tiny_model):
    answers = (Answer(torch.arange(5), torch.tensor([7, 9]), 1),)
    (result,) = score_items(tiny_model("dream"), [Item("a", answers)], MonteCarlo(sampling="published"), Batches(999))
    assert result.samples == 128 and result.errors[0] > 0


def test_exact_and_sampled_answers_of_one_item(tiny_model):
    """Per size the two are equal but for one part in a thousand."""
    model, prompt = tiny_model(), torch.arange(5)
    make = lambda *sizes: Item(  # noqa: E731
        "a", tuple(Answer(prompt, torch.arange(7, stop), size) for stop, size in zip((8, 14), sizes, strict=True))
    )
    (full,) = score_items(model, [make(1, 1)], MonteCarlo(64), Batches(999))
    item = make(10_000, round(10_010 * full.log_likelihoods[1] / full.log_likelihoods[0]))
    counts = []
    for confidence in (0.1, 0.999999999):
        settings = MonteCarlo(64, 8, adaptive=True, confidence=confidence)
        (result,) = score_items(model, [item], settings, Batches(999))
        assert result.errors[0] == 0 < result.errors[1]
        assert result.log_likelihoods[0] == pytest.approx(full.log_likelihoods[0], rel=1e-6)
        counts.append(result.samples)
    assert 16 <= counts[0] < counts[1]


def test_equal_patterns_are_run_once(tiny_model):
    """Two tokens have three masks, whatever the number of samples and looks."""
    model, rows = tiny_model(), []
    model.embedding.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    item = Item(
        "a", (Answer(torch.arange(5), torch.tensor([7, 8]), 1), Answer(torch.arange(5), torch.tensor([9, 6]), 1))
    )
    for settings in (MonteCarlo(128), MonteCarlo(128, adaptive=True, confidence=0.999999)):
        rows.clear()
        score_items(model, [item], settings, Batches(10_000))
        assert sum(rows) == 5  # [M] 8, 7 [M], [M] 6, 9 [M], and [M] [M] in common
    rows.clear()
    score_items(model, [item], MonteCarlo(128, cfg_scale=0.5), Batches(10_000))
    assert sum(rows) == 10


def test_samples_without_a_mask_are_not_run(tiny_model):
    """Of Dream's two maskable tokens three masks are run and the fourth, of none, is known to be 0."""
    model, rows = tiny_model("dream"), []
    model.embedding.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    item = Item("a", (Answer(torch.arange(5), torch.tensor([7, 8, 9]), 1),))
    score_items(model, [item], MonteCarlo(256), Batches(10_000))
    assert sum(rows) == 3


def record_masks(monkeypatch) -> list[torch.Tensor]:
    """What is handed to forward passes from now on: masks (n, T)."""
    seen, original = [], choices.token_nats
    monkeypatch.setattr(
        choices, "token_nats", lambda model, rows, *rest: (seen.append(rows.masked), original(model, rows, *rest))[1]
    )
    return seen


def test_nats_are_held_of_targets_alone(tiny_model, monkeypatch):
    """A prompt of 50 tokens takes no room while an item waits for its next look."""
    held, original = [], choices._Scorer.is_decided

    def look(scorer, state):
        for answer in state.answers:
            held.extend(row.untyped_storage().nbytes() / len(answer.by_mask) for row in answer.by_mask.values())
        return original(scorer, state)

    monkeypatch.setattr(choices._Scorer, "is_decided", look)
    answers = lambda *targets: tuple(Answer(torch.arange(50), torch.tensor(ids), 1) for ids in targets)  # noqa: E731
    items = [Item(f"q/{index}", answers((7, 8, 9), (index, 8, 7))) for index in range(4)]
    score_items(tiny_model(), items, MonteCarlo(128, adaptive=True), Batches(9999))
    assert held and max(held) <= 3 * 8  # 3 doubles a mask


def test_noise_is_common_to_checkpoints_and_answers(tiny_model, monkeypatch):
    item, masks = make_items()[1], record_masks(monkeypatch)
    twins = Item(item.key, (item.answers[0], Answer(item.answers[0].prompt, item.answers[0].target + 1, 2)))
    for seed in (0, 1):
        score_items(tiny_model(seed=seed), [twins], MonteCarlo(32), Batches(999))
    assert len(masks) == 2 and torch.equal(masks[0], masks[1])
    first, second = masks[0].chunk(2)  # of the two answers
    assert torch.equal(first, second)
    (same,) = score_items(tiny_model(), [Item("x", (item.answers[0],) * 2)], MonteCarlo(32), Batches(999))
    assert same.log_likelihoods[0] == same.log_likelihoods[1]
    (other,) = score_items(tiny_model(), [Item("y", (item.answers[0],))], MonteCarlo(32), Batches(999))
    assert other.log_likelihoods[0] != same.log_likelihoods[0]  # another item, other noise


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.inference_mode()
def test_what_stops_early_is_estimated_from_its_samples_and_forecasts(tiny_model, family):
    """The samples are the first of the full count's, forecasts fill the rest, and errors of both add in squares."""
    model, item, form = tiny_model(family), make_items()[0], FORMS[family_named(family).likelihood]
    settings = MonteCarlo(64, 4, adaptive=True, confidence=0.6)
    (result,) = score_items(model, [item], settings, Batches(999))
    seen = result.samples
    assert seen < 64 and seen % 4 == 0
    columns, width = aligned_columns([answer.target for answer in item.answers])
    drawn = draw_uniform(form, 64, 4, width, "stratified", item_generator(0, item.key))
    for answer, own, log_likelihood, error in zip(
        item.answers, columns, result.log_likelihoods, result.errors, strict=True
    ):
        samples = form.perturb(drawn[0], drawn[1][:, own])
        nats = torch.zeros(seen, len(answer.target)).double()
        for row, mask in zip(nats, samples.masked[:seen], strict=True):
            for token in mask.nonzero().flatten():
                alone = torch.arange(len(mask)) == token
                row[token] = sample_nats(model, answer, mask, 0, alone)
        completed = complete(samples.masked, samples.weight, nats, seen)
        assert completed.repeats.any() and log_likelihood == pytest.approx(-completed.values.mean().item(), rel=1e-4)
        blocks = (nats.sum(1) * samples.weight[:seen]).view(-1, 4).mean(1)  # (K,)
        full = blocks.std().item() / 4  # √16 blocks
        assert error == pytest.approx((full**2 + completed.error() ** 2) ** 0.5, rel=1e-3)


def test_small_blocks_wait_for_sixteen_samples(tiny_model):
    (result,) = score_items(
        tiny_model(), make_items()[:1], MonteCarlo(64, 1, adaptive=True, confidence=0.01), Batches(999)
    )
    assert result.samples == 16


def test_a_single_answer_gets_all_samples(tiny_model):
    (result,) = score_items(tiny_model(), make_items()[2:], MonteCarlo(64, adaptive=True), Batches(999))
    assert result.samples == 64


@pytest.mark.slow
def test_adaptive_choices_are_those_of_the_full_count(tiny_model):
    """Raw and normalised, at the stated confidence, with fewer samples."""
    model, generator = tiny_model(), torch.Generator().manual_seed(2)
    items = []
    for index in range(80):
        targets = torch.randint(0, 2000, (2, 4), generator=generator)
        answers = (Answer(targets[0, :0], targets[0], 5), Answer(targets[0, :0], targets[1], 6))
        items.append(Item(f"t/{index}", answers))
    full = score_items(model, items, MonteCarlo(64, 4), Batches(4000))
    quick = score_items(model, items, MonteCarlo(64, 4, adaptive=True, confidence=0.9), Batches(4000))
    chosen = lambda each, sizes: max((0, 1), key=lambda i: each.log_likelihoods[i] / sizes[i])  # noqa: E731
    apart = sum(
        any(chosen(a, sizes) != chosen(b, sizes) for sizes in ((1, 1), (5, 6)))
        for a, b in zip(full, quick, strict=True)
    )
    assert apart <= 8
    assert sum(each.samples for each in quick) < 0.8 * 80 * 64


def test_samples_without_a_mask_left_out_as_released(tiny_model):
    """Dream's released mean: over samples that have a mask, larger by just their share."""
    model, item = tiny_model("dream"), make_items()[2]  # two tokens: without a mask when t is small
    form, settings = FORMS["independent"], MonteCarlo(32, sampling="published")
    drawn = draw_uniform(form, 32, 8, 2, "published", item_generator(0, item.key))
    share = form.perturb(*drawn).masked.any(1).double().mean().item()
    assert 0.2 < share < 0.9
    (ours,) = score_items(model, [item], settings, Batches(999))
    (released,) = score_items(model, [item], MonteCarlo(32, sampling="published", skip_empty=True), Batches(999))
    assert released.log_likelihoods[0] * share == pytest.approx(ours.log_likelihoods[0], rel=1e-6)
    with pytest.raises(UserError, match="item task/2: none of its 1 blocks has a mask: raise samples"):
        for seed in range(50):
            score_items(model, [item], MonteCarlo(1, skip_empty=True, seed=seed), Batches(999))


def test_one_block_has_no_error(tiny_model):
    (result,) = score_items(tiny_model(), make_items()[:1], MonteCarlo(4, 8), Batches(999))
    assert result.errors == (None, None) and result.samples == 4
