"""Verify the Triton kernels without a GPU, and topd under other versions of its hosts. Nothing here is installed with topd, and
nothing here measures a time: that is topd_bench.

    python -m tools.aot       compile the kernels for devices that are not here; registers, stack, spills, shared memory
                              (variants.py lists what a launcher can choose, binaries.py compiles and reads the binary)
    python -m tools.account   bytes and flop of linear_divergence on a GPU, and times predicted from them
    tools.watched             run launches in Triton's interpreter, every address checked, bytes and flop counted: for tests
    make versions             run the tests of the integrations under other versions of transformers and TRL (versions.py)

What they read is what launchers return, topd_kernels.shared.launch.Launch. docs/gpu.md has their results.
"""
