"""Base models: what there is (`catalogue`, standard library only) and how each gets onto this machine (`install`)."""
