-- A worker has stopped executing an attempt.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 worker id, 4 attempt, 5 the payload of an error marker, should the job not have ended,
--       6 retention in ms
-- Returns 1, 2 if that has ended the job, or 0 if the attempt is not the job's current one, or not this worker's.

even_without_memory()
local id, worker, attempt = ARGV[2], ARGV[3], ARGV[4]
local job = redis.call('HMGET', KEYS[1], 'status', 'worker', 'attempt')
if not job[1] then -- the record has expired
  redis.call('ZREM', deadlines, id)
  take_from_unfinished(id)
end
if job[2] ~= worker then redis.call('SREM', worker_jobs_key(worker), id) end
if job[2] ~= worker or job[3] ~= attempt then return 0 end

local now = now_ms()
local ends = job[1] == 'running'
if ends then
  note_entries(id)
  end_job(id, int(tonumber(attempt) + 1) .. '-0', 'error', ARGV[5], 'failed', now, ARGV[6])
end
release(id, now)
return ends and 2 or 1
