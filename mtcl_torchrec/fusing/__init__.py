"""Everything that is fitted on held-out predictions: calibration and fusion."""
