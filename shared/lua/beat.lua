-- Renews a worker's lease, and notes whether it is present: whether a connection listens to its channel.
-- KEYS[1] the workers
-- ARGV: 1 prefix, 2 worker id, 3 lease in ms, 4.. fields and values that describe the worker
-- Returns 1, or 0 if the worker had no lease: it is new, or it was taken for lost and its jobs are no longer its own.

even_without_memory()
local worker = ARGV[2]
local had_lease = redis.call('ZADD', KEYS[1], int(now_ms() + tonumber(ARGV[3])), worker) == 0
redis.call('HSET', worker_key(worker), unpack(ARGV, 4))
redis.call('PEXPIRE', worker_key(worker), int(tonumber(ARGV[3]) * 10))

-- Who beats is alive, whatever became of its subscription. Only one that was there can go away.
redis.call('HDEL', worker_key(worker), 'absent_ms', 'present_on')
local run_id = subscribers({worker_channel(worker)})[1] > 0 and server_run_id()
if run_id then redis.call('HSET', worker_key(worker), 'present_on', run_id) end
return had_lease and 1 or 0
