"""The independent consumers. Each module declares one; `app` runs any of them."""
