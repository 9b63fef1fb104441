"""The event log: the relay that publishes outboxes, the consumers' delivery rules, replay, and the gateways' route feed."""
