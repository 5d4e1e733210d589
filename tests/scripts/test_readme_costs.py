"""The tables of costs, made of small results."""


def test_prunings_of_one_process_and_of_two(scripts):
    one, two = {"refit": 8.0, "check": 2.0, "total": 10.0}, {"refit": 6.0, "check": 1.0, "total": 7.0}
    run = {
        "median": {"1": one, "2": two},
        "shared": {"refit": 4.0, "check": 2.0},
        "ratio": 10 / 7,
        "predicted": {"4": 1.8},
    }
    settings = {"calibration.windows": 64, "calibration.length": 128, "rounds": 3}
    machine = {"processor": "CPU", "cores": 2, "torch": "2.13.0"}
    text = scripts("readme_costs").processes({"runs": {"masks": run}, "settings": settings, "machine": machine})
    assert "| masks | 10.0 s | 7.0 s | 1.43x | 60% | 1.80x |" in text
    assert "refit 8.0 s to 6.0 s, check 2.0 s to 1.0 s" in text and "64 windows of 128 tokens" in text
