"""What the notebooks need in addition to the trainer: studies, benchmarks, figures, pages, widgets."""
