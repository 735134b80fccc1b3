-- A worker has stopped executing an attempt that was ended from outside.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 worker id, 4 attempt
-- Returns 1, or 0 if the job is not this worker's any more.

local job = redis.call('HMGET', KEYS[1], 'worker', 'attempt')
if job[1] ~= ARGV[3] or job[2] ~= ARGV[4] then
  redis.call('SREM', worker_jobs_key(ARGV[3]), ARGV[2])
  return 0
end
release(ARGV[2], now_ms())
return 1
