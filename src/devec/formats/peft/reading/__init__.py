"""From the keys and shapes of a PEFT file to its slots."""
