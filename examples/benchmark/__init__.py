"""The parts of benchmark_training.py and paper_table.py."""
