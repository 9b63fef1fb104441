"""A model server for one model: `python -m workloads.serve --help`. OpenAI's shapes at `/v1/*`, and `/predict` that picks by payload."""
