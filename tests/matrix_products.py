"""The cost of a call in matrix products, of 2 N H V flop each, counted by torch's profiler."""

from torch.profiler import ProfilerActivity, profile

N, H, V = 96, 16, 800
PRODUCTS = {"aten::mm": (0, 1), "aten::addmm_": (1, 2)}


def matrix_products(run) -> float:
    """Return the flop of the matrix products that run() calls, in units of 2 N H V."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        run()
    flop = 0
    for event in profiled.events():
        if event.name in PRODUCTS:
            left, right = (event.input_shapes[i] for i in PRODUCTS[event.name])
            flop += 2 * left[0] * left[1] * right[1]
    return flop / (2 * N * H * V)
