-- A worker leaves in good order: it runs nothing any more.
-- KEYS[1] the workers
-- ARGV: 1 prefix, 2 worker id

redis.call('ZREM', KEYS[1], ARGV[2])
redis.call('DEL', worker_key(ARGV[2]), worker_jobs_key(ARGV[2]))
return 1
