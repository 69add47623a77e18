"""Benchmarks, and the training of the packaged weights; `samft` never imports from here."""
