"""What a terminal shows of a text on its way."""

from structprune.report.denoising import denoising_text, printable

WORDS = {1: " a", 2: " b", 3: "\x1b[31m"}


def decode(tokens):
    return "".join(WORDS[token] for token in tokens)


def styles(text):
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_new_tokens_are_bold_and_masks_shaded():
    text = denoising_text([1, 2, 9, 9, 2], [1, 9, 9, 9, 9], 9, decode)
    assert text.plain == " a b░░ b"
    assert styles(text) == [(" b", "bold green"), ("░░", "bright_black"), (" b", "bold green")]


def test_the_first_step_has_nothing_new():
    text = denoising_text([9, 9, 1], [], 9, decode)
    assert text.plain == "░░ a" and styles(text) == [("░░", "bright_black")]


def test_what_a_terminal_would_obey_is_shown_as_its_code():
    assert denoising_text([3], [3], 9, decode).plain == "\\x1b[31m"
    assert printable("ä\n\tb\x07\r") == "ä\n\tb\\x07\\r"
