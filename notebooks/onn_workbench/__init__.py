"""What the notebooks need: studies, benchmarks, figures, pages, widgets."""
