"""What policy training and generation share: seeds, operations, observation, verdict, rules."""
