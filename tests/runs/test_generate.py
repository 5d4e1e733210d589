"""`structprune.generate`: the tokens of the sampler as text, and what is refused before weights are read."""

import json

import pytest
import torch

import structprune
from structprune.assets import model_directory
from structprune.errors import UserError
from structprune.generation.generate import generate as denoise
from structprune.generation.samplers import LLaDAGeneration
from structprune.generation.settings import GenerateConfig
from structprune.runs import generate as module
from structprune.runs.generate import Observers, TextGenerator, generate

PROMPTS = ["The server is", "Use the following command to"]
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return structprune.load_model(model_directory(), device="cpu")


def test_text_is_the_samplers_tokens_decoded(model):
    results = generate(model, PROMPTS, gen_length=16, block_length=8)
    tokenizer = structprune.load_tokenizer(model_directory())
    prompts = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in PROMPTS]
    outputs = denoise(model, prompts, LLaDAGeneration(16, 16, 8))
    for result, prompt, output in zip(results, prompts, outputs, strict=True):
        assert torch.equal(result.ids, output[len(prompt) :])
        assert result.text == tokenizer.decode(result.ids.tolist()) and len(result.text) > 16
    assert generate(model, PROMPTS[0], gen_length=16, block_length=8).text == results[0].text


def test_a_directory_is_loaded_and_options_outrank_the_configuration(model):
    config = GenerateConfig.load(overrides={"generation.gen_length": 8, "generation.steps": 4, "model.device": "cpu"})
    result = structprune.generate(str(model_directory()), PROMPTS[0], config, gen_length=12)
    assert torch.equal(result.ids, generate(model, PROMPTS[0], gen_length=12, steps=4).ids) and len(result.ids) == 12


def test_steps_are_observed_and_counted(model):
    config = GenerateConfig.load(overrides={"generation.gen_length": 8, "generation.batch": 1})
    steps, sizes = [], []

    def track(items):
        sizes.append(len(items))
        return items

    generator = TextGenerator(model, config)
    _, cost = generator.run(PROMPTS, Observers(steps.append, track))
    assert (cost.tokens, cost.passes, len(steps), sizes) == (16, 16, 16, [16]) and cost.seconds > 0
    masks = [int((each.ids[0, -8:] == model.config.mask_token_id).sum()) for each in steps]
    assert masks == [8, 7, 6, 5, 4, 3, 2, 1] * 2
    assert generator.run([])[1].tokens == 0


def test_a_threshold_saves_passes(model):
    config = GenerateConfig.load(overrides={"generation.gen_length": 32, "generation.threshold": 0.1})
    _, cost = TextGenerator(model, config).run(PROMPTS[:1])
    assert cost.passes < 32


def test_what_is_drawn_depends_on_the_seed(model):
    options = {"gen_length": 16, "temperature": 1.0}
    first, again, other = (generate(model, PROMPTS[0], seed=seed, **options).text for seed in (0, 0, 1))
    assert first == again != other


def with_template(directory, template):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return str(directory)


def test_chat_renders_texts_and_conversations(tiny_checkpoint):
    name = with_template(tiny_checkpoint(), CHAT)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "B"},
    ]
    text, conversation = generate(name, ["Hi", turns], chat=True, gen_length=4)
    assert text.prompt == "[user] Hi\n[assistant]"
    assert conversation.prompt == "[user] Hi\n[assistant] Yes\n[user] B\n[assistant]"
    with pytest.raises(UserError, match="a conversation needs the chat template: set generation.chat = true"):
        generate(name, [turns], gen_length=4)


def test_a_template_that_does_not_fit_the_name_is_told(tiny_checkpoint):
    plain, tuned = (with_template(tiny_checkpoint(name=name), CHAT) for name in ("Base", "Tiny-Instruct"))
    cases = {
        (plain, False): None,
        (tuned, True): None,
        (tuned, False): "without --chat",
        (plain, True): "Base checkpoint",
    }
    for (name, chat), words in cases.items():
        warning = TextGenerator.open(name, GenerateConfig.load(overrides={"generation.chat": chat})).warning
        assert warning is None if words is None else words in warning, (name, chat)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gen_length": 250}, "gen_length = 250 more do not fit the model's 256"),
        ({"gen_length": 20, "block_length": 8}, "gen_length = 20 is not a multiple of block_length = 8"),
        ({"steps": 10}, "steps = 10 cannot be shared by 4 blocks"),
        ({"alg": "entropy"}, "llada's sampler has no option 'alg'"),
        ({"cache": "dual", "gen_length": 20}, "use prefix, which does the same"),
        ({"refresh": 2}, "refresh = 2 has no effect without a cache: set cache = prefix, or drop it"),
        ({"threshold": 0.9, "remasking": "random"}, "threshold = 0.9 needs a probability"),
        ({"chat": True}, "has no chat template"),
        ({"gen_lenght": 3}, "unknown config key"),
        ({"cache": "all"}, "generation.cache"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_weights_are_read(options, words, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError) as error:
        generate(str(model_directory()), PROMPTS[0] * 3, **options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "prompts, words",
    [
        ([PROMPTS[0], ""], "prompt 1 is empty: give it some text"),
        ("a\udcff", "is no UTF-8 text"),
        ([[1, 2]], "is no text and no list of messages with role and content"),
        ([{"role": "user", "content": "Hi"}], "a conversation in a list of its own"),
        ([b"abc"], "is no text and no list of messages"),
        (5, "the prompts 5 are no text and no list"),
        (None, "are no text and no list"),
        ([[{"role": "user", "content": "Hi"}]], "a conversation needs the chat template"),
    ],
)
def test_bad_prompts_are_refused_before_weights_are_read(prompts, words, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError) as error:
        generate(str(model_directory()), prompts)
    assert words in str(error.value)


def test_settings_of_loading_are_refused_for_a_loaded_model(model):
    with pytest.raises(UserError, match="model.dtype has no effect on a model that is loaded"):
        generate(model, PROMPTS[0], GenerateConfig.load(overrides={"model.dtype": "float32"}))


def test_dream_takes_its_own_options(tiny_checkpoint):
    name = str(tiny_checkpoint("dream"))
    base = generate(name, "A b", gen_length=8, alg="maskgit_plus", threshold=0.5)
    assert torch.equal(generate(name, "A b", gen_length=8, threshold=0.5).ids, base.ids)
    with pytest.raises(UserError, match="dream's sampler has no option 'block_length'"):
        generate(name, "A b", gen_length=8, block_length=4)
    assert base.prompt == "A b"


def test_dreams_prompt_begins_with_a_bos_where_the_tokenizer_names_one(tiny_checkpoint):
    names = [tiny_checkpoint("dream", name=name) for name in ("without", "with")]
    path = names[1] / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "a"}))
    config = GenerateConfig.load(overrides={"generation.gen_length": 4})
    plain, begun = (TextGenerator.open(name, config).reader.read(["cd"])[0][1].tolist() for name in names)
    bos = structprune.load_tokenizer(names[1]).bos_token_id
    assert begun == [bos, *plain]
