import os
import platform

import torch

from structprune.bench import machine


def test_description_is_what_this_machine_is():
    result = machine.describe_machine()
    assert list(result) == ["processor", "cores", "threads", "system", "python", "torch", "cuda_device"]
    assert 1 <= result["cores"] <= os.cpu_count() and result["threads"] == torch.get_num_threads()
    assert result["torch"] == torch.__version__ and result["python"] == platform.python_version()
    assert (result["cuda_device"] is None) == (not torch.cuda.is_available())
    assert result["processor"]


def test_processor_name_is_read_from_the_listing_or_else_from_the_platform(tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: Tiny CPU @ 1 GHz: fast\nprocessor\t: 1\nmodel name\t: Other\n")
    assert machine._processor(listing) == "Tiny CPU @ 1 GHz: fast"
    listing.write_text("processor : 0\n")
    assert machine._processor(listing) in (platform.processor(), platform.machine())
