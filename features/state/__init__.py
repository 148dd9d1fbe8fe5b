"""What a store records about itself: header, row ids, ledger of committed shards, quarantine, and the commit protocol.

The rooms above use `catalog.Catalog`, which combines ids and ledger for readers, and `commit.commit_shard` for writers;
`counts.count_clips` counts clips without opening the store.
"""
