"""`/predict` on stock vLLM: `predict.py` is mounted into its container alone and loaded with `--middleware predict.Predict`."""
