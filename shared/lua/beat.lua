-- Renews a worker's lease, and notes whether it is present: whether a connection listens to its channel. And lets the
-- sweep end those of its jobs whose agents fall silent.
-- KEYS[1] the workers
-- ARGV: 1 prefix, 2 worker id, 3 lease in ms, 4 how many fields and values describe the worker, then these, then for
--       each idle deadline: job id, attempt, ms until then
-- Returns 1, or 0 if the worker had no lease: it is new, or it was taken for lost and its jobs are no longer its own.

even_without_memory()
local worker, lease_ms, described_by, now = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), now_ms()
local had_lease = redis.call('ZADD', KEYS[1], int(now + lease_ms), worker) == 0
redis.call('HSET', worker_key(worker), unpack(ARGV, 5, 4 + described_by))
redis.call('PEXPIRE', worker_key(worker), int(lease_ms * 10))

-- Who beats is alive, whatever became of its subscription. Only one that was there can go away.
redis.call('HDEL', worker_key(worker), 'absent_ms', 'present_on')
local run_id = subscribers({worker_channel(worker)})[1] > 0 and server_run_id()
if run_id then redis.call('HSET', worker_key(worker), 'present_on', run_id) end

-- One lease later than the worker would do it: a worker that keeps its lease has told in time that its agent spoke.
for i = 5 + described_by, #ARGV, 3 do
  local id = ARGV[i]
  local job = redis.call('HMGET', job_key(id), 'status', 'worker', 'attempt', 'deadline_ms')
  if job[1] == 'running' and job[2] == worker and job[3] == ARGV[i + 1] then
    redis.call('ZADD', deadlines, 'XX', int(math.min(tonumber(job[4]), now + tonumber(ARGV[i + 2]) + lease_ms)), id)
  end
end
return had_lease and 1 or 0
