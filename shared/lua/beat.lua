-- Renews a worker's lease.
-- KEYS[1] the workers
-- ARGV: 1 prefix, 2 worker id, 3 lease in ms, 4.. fields and values that describe the worker
-- Returns 1, or 0 if the worker had no lease: it is new, or it was taken for lost and its jobs are no longer its own.

even_without_memory()
local had_lease = redis.call('ZADD', KEYS[1], int(now_ms() + tonumber(ARGV[3])), ARGV[2]) == 0
redis.call('HSET', worker_key(ARGV[2]), unpack(ARGV, 4))
redis.call('PEXPIRE', worker_key(ARGV[2]), int(tonumber(ARGV[3]) * 10))
return had_lease and 1 or 0
