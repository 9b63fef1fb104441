"""The studio's records: the store port, its adapters, and one repository per collection."""
