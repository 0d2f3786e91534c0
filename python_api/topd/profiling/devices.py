"""A device in words."""

import torch


def device_words(device: torch.device) -> str:
    """Return a GPU's name, or a CPU with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}"
