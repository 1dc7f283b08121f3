"""LLM engines behind one protocol, and the ledger of what they were asked."""
