"""The table of decoding, from small results."""


def test_a_row_for_every_form(scripts):
    row = {"form": "threshold 0.9", "passes_per_token": 0.5, "tokens_per_second": 8.0, "speedup": 1.75, "equal": 0.875}
    sizes = {"openings": 3, "opening": 4, "tokens": 16, "block_length": 8, "rounds": 5}
    machine = {"processor": "P", "cores": 1, "torch": "2.13"}
    facts = {"name": "small", "text": "t.txt", "sizes": sizes, "machine": machine}
    text = scripts("readme_bench").decoding({"rows": [row | {"nelbo": 2.25}], **facts})
    assert "| threshold 0.9 | 0.50 | 1.75x | 87.5% | 2.25 |" in text
    assert "3 openings of 4 tokens of `t.txt`, 16 tokens after each, blocks of 8" in text
    assert "small, fp32 (P, 1 core, torch 2.13)" in text and "median over 5 rounds" in text
