"""The tables of costs, made of small results."""


def test_prunings_of_one_process_and_of_two(scripts):
    one, two = {"refit": 8.0, "check": 2.0, "total": 10.0}, {"refit": 6.0, "check": 1.0, "total": 7.0}
    run = {
        "median": {"1": one, "2": two},
        "shared": {"refit": 4.0, "check": 2.0},
        "ratio": 10 / 7,
        "farthest": [0.0, 2e-6],
        "predicted": {"4": 1.8},
    }
    settings = {"calibration.windows": 64, "calibration.length": 128, "rounds": 3}
    machine = {"processor": "CPU", "cores": 2, "torch": "2.13.0"}
    text = scripts("readme_costs").processes({"runs": {"masks": run}, "settings": settings, "machine": machine})
    assert "| masks | 10.0 s | 7.0 s | 1.43x | 2e-06 | 60% | 1.80x |" in text
    assert "refit 8.0 s to 6.0 s, check 2.0 s to 1.0 s" in text and "64 windows of 128 tokens" in text


def test_rows_of_another_machine_are_named_under_the_table(scripts):
    first, second = ({"processor": name, "cores": 1, "torch": "2.13.0"} for name in ("CPU", "other CPU"))
    row = {
        "size": "8B", "way": "disk", "peak_bytes": 2e9, "predicted_bytes": 2.2e9, "seconds": 10.0,
        "core_seconds": 6.0, "queued_seconds": 3.0, "read_bytes": 1e9,
    }  # fmt: skip
    rows = [row | {"run": name, "machine": own} for name, own in (("a", first), ("b", second), ("c", first))]
    volume = {"windows": 2, "window": 64, "levels": 2}
    text = scripts("readme_costs").offload({"rows": rows, "compared": [], "volume": volume})
    assert "| 8B | a | disk | 2.00 GB | 2.20 GB | 1.10x | 10 s | 6 s | 10% | 1.0 GB |" in text
    assert "CPU, 1 core, torch 2.13.0; 8B b disk: other CPU, 1 core, torch 2.13.0." in text


def test_how_soon_a_rehearsal_is_over(scripts):
    row = {
        "run": "sparsegpt", "until_over": {"seconds": 61.2, "core_seconds": 50.0},
        "rehearsal": {"seconds": 59.6, "core_seconds": 48.4},
    }  # fmt: skip
    result = {"size": "8B", "volume": {"windows": 2, "window": 64, "levels": 2}, "rows": [row]}
    own = {"processor": "CPU", "cores": 2, "threads": 1, "torch": "2.13.0"}
    text = scripts("readme_costs").rehearsal(result | {"machine": own})
    assert "| sparsegpt | 61 s | 50 s | 60 s | 48 s |" in text
    assert "--size 8B --threads 1`" in text and "windows of 64 tokens at 2 levels; CPU, 2 cores" in text
