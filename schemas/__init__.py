"""REST models. `published/` holds what is generated from them and from the events."""
