"""From a request as servers log it to the token ids of its prompt."""
