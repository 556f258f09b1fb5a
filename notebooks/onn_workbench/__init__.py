"""What the notebooks need beside the trainer: studies, benchmarks, figures, pages, widgets."""
