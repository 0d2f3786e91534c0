"""`python -m topd_bench.gpu`: times of everything on a GPU. What is right there is said by `pytest -m gpu`."""
