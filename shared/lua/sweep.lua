-- Moves on what cannot move by itself: the jobs of lost workers, jobs past their deadline, and sessions that are held.
-- KEYS[1] the deadlines
-- ARGV: 1 prefix, 2 most deadlines to look at, 3 retention in ms, 4 queue timeout in ms, 5 most attempts of a job,
--       then the payloads of the error markers: 6 worker_lost, 7 timeout, 8 queue_timeout, 9 no_worker
-- Returns a list of {job id, what happened}: 'retried' | 'worker_lost' | 'timeout' | 'queue_timeout' | 'no_worker'.

even_without_memory()
local now, limit, retention_ms = now_ms(), ARGV[2], ARGV[3]
local swept = {}

-- A lost worker's job: run it again if nothing was shown, otherwise end it, and fence the worker in both cases.
local function recover(id, worker)
  local job = redis.call('HMGET', job_key(id), 'status', 'worker', 'attempt')
  if job[1] == 'running' and job[2] == worker then
    local attempt = tonumber(job[3])
    local last = redis.call('XREVRANGE', stream_key(id), '+', '-', 'COUNT', 1)
    local nothing_shown = #last == 1 and last[1][1] == int(attempt) .. '-0'
    if nothing_shown and attempt < tonumber(ARGV[5]) then
      local deadline, opened = int(now + tonumber(ARGV[4])), int(attempt + 1)
      redis.call('XADD', stream_key(id), opened .. '-0', 'open', '')
      redis.call('HSET', job_key(id), 'status', 'queued', 'attempt', opened, 'opened', opened, 'worker', '',
                 'deadline_ms', deadline)
      redis.call('PUBLISH', stream_channel(id), opened .. '-0 open ')
      redis.call('ZADD', deadlines, deadline, id)
      make_claimable(id, now)
      swept[#swept + 1] = {id, 'retried'}
    else
      end_job(id, int(attempt + 1) .. '-0', 'error', ARGV[6], 'failed', now, retention_ms)
      release(id, now)
      swept[#swept + 1] = {id, 'worker_lost'}
    end
  elseif is_terminal(job[1]) and job[2] == worker then
    release(id, now)
  end
end

for _, worker in ipairs(redis.call('ZRANGEBYSCORE', workers, '-inf', int(now))) do
  for _, id in ipairs(redis.call('SMEMBERS', worker_jobs_key(worker))) do recover(id, worker) end
  redis.call('ZREM', workers, worker)
  redis.call('DEL', worker_key(worker), worker_jobs_key(worker))
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now), 'LIMIT', 0, limit)) do
  local status = redis.call('HGET', job_key(id), 'status')
  if status == 'running' then
    end_from_outside(id, ARGV[7], 'failed', now, retention_ms)
    swept[#swept + 1] = {id, 'timeout'}
  elseif status == 'queued' then
    local nobody = redis.call('ZCARD', workers) == 0
    end_from_outside(id, nobody and ARGV[9] or ARGV[8], 'failed', now, retention_ms)
    swept[#swept + 1] = {id, nobody and 'no_worker' or 'queue_timeout'}
  else -- it has ended, and its worker has not said within RELEASE_MS that it stopped; or it has expired
    release(id, now)
  end
end
return swept
