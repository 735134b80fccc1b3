-- A worker has stopped executing an attempt.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 worker id, 4 attempt, 5 the payload of an error marker, should the job not have ended,
--       6 retention in ms
-- Returns 1, 2 if that has ended the job, or 0 if the attempt is not the job's current one, or not this worker's.

even_without_memory()
local id, worker, attempt = ARGV[2], ARGV[3], ARGV[4]
local job = look_up(id)
if not job.status then -- the record has expired
  redis.call('ZREM', deadlines, id)
  take_from_unfinished(id)
end
if job.worker ~= worker then redis.call('SREM', worker_jobs_key(worker), id) end
if job.worker ~= worker or job.attempt ~= attempt then return 0 end

local now = now_ms()
local ends = job.status == 'running'
if ends then
  note_entries(id)
  end_job(id, job, int(tonumber(attempt) + 1) .. '-0', 'error', ARGV[5], 'failed', now, ARGV[6])
end
release(id, job, now)
return ends and 2 or 1
