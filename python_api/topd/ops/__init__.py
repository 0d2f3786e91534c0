"""The ops: one file each, with its schema, fake, gradient and backends. They know no method and no trainer."""
