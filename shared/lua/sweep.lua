-- Moves on what cannot move by itself: the jobs of lost workers, jobs past their deadline, and sessions that are held.
-- Takes the jobs that have expired out of the index.
-- KEYS[1] the deadlines
-- ARGV: 1 prefix, 2 most deadlines to look at, 3 retention in ms, 4 queue timeout in ms, 5 most attempts of a job,
--       then the payloads of the error markers: 6 worker_lost, 7 timeout, 8 queue_timeout, 9 no_worker,
--       10 how long ago the last sweep of any process has to be, in ms, or nothing is done; 0: sweep in any case,
--       11 most expired jobs to take out of the index
-- Returns a list of {job id, what happened}: 'retried' | 'worker_lost' | 'timeout' | 'queue_timeout' | 'no_worker'.

even_without_memory()
local now, limit, retention_ms = now_ms(), ARGV[2], ARGV[3]
local swept = {}

if ARGV[10] ~= '0' and not redis.call('SET', sweeper, '1', 'NX', 'PX', ARGV[10]) then return swept end

-- For whoever looks at the job: an attempt that nobody has seen anything of.
local function note_lost(id, attempt, worker, now)
  local noted = redis.call('HMGET', job_key(id), 'lost', 'started_ms')
  local lost = noted[1] and cjson.decode(noted[1]) or {}
  lost[#lost + 1] = {attempt = attempt, worker = worker, started_ms = tonumber(noted[2]), lost_ms = now}
  redis.call('HSET', job_key(id), 'lost', cjson.encode(lost))
end

-- A lost worker's job: run it again if nothing was shown, otherwise end it, and fence the worker in both cases.
local function recover(id, worker)
  local job = look_up(id)
  if job.status == 'running' and job.worker == worker then
    local attempt = tonumber(job.attempt)
    local last = redis.call('XREVRANGE', stream_key(id), '+', '-', 'COUNT', 1)
    local nothing_shown = #last == 1 and last[1][1] == int(attempt) .. '-0'
    if nothing_shown and attempt < tonumber(ARGV[5]) then
      local deadline, opened = int(now + tonumber(ARGV[4])), int(attempt + 1)
      redis.call('XADD', stream_key(id), opened .. '-0', 'open', '')
      redis.call('HSET', job_key(id), 'status', 'queued', 'attempt', opened, 'opened', opened, 'worker', '',
                 'deadline_ms', deadline)
      note_lost(id, attempt, worker, now)
      redis.call('PUBLISH', stream_channel(id), opened .. '-0 open ')
      redis.call('ZREM', shelf_key(shelf_of(job.tenant, job.kind, job.store, 'running', '', job.model)), id)
      put_on_shelf(shelf_of(job.tenant, job.kind, job.store, 'queued', '', job.model), id, job.accepted_ms,
                   redis.call('PTTL', job_key(id)))
      redis.call('ZADD', deadlines, deadline, id)
      make_claimable(id, now)
      swept[#swept + 1] = {id, 'retried'}
    else
      note_entries(id)
      end_job(id, job, int(attempt + 1) .. '-0', 'error', ARGV[6], 'failed', now, retention_ms)
      release(id, job, now)
      swept[#swept + 1] = {id, 'worker_lost'}
    end
  elseif is_terminal(job.status) and job.worker == worker then
    release(id, job, now)
  end
end

-- Ends the lease of each worker that was present on this server, and has been absent for ABSENCE_MS without a beat.
local function end_leases_of_the_absent()
  local present, channels = {}, {}
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', workers, '(' .. int(now), '+inf')) do
    local noted = redis.call('HMGET', worker_key(worker), 'present_on', 'absent_ms')
    if noted[1] then
      present[#present + 1] = {id = worker, on = noted[1], absent_ms = noted[2]}
      channels[#channels + 1] = worker_channel(worker)
    end
  end
  if #present == 0 then return end
  local run_id
  for i, count in ipairs(subscribers(channels)) do
    local worker = present[i]
    if count > 0 then
      if worker.absent_ms then redis.call('HDEL', worker_key(worker.id), 'absent_ms') end
    else
      run_id = run_id or server_run_id()
      if worker.on == run_id then -- otherwise Redis itself has gone away, with every subscription
        if not worker.absent_ms then
          redis.call('HSET', worker_key(worker.id), 'absent_ms', int(now))
        elseif now - tonumber(worker.absent_ms) >= ABSENCE_MS then
          redis.call('ZADD', workers, int(now), worker.id)
        end
      end
    end
  end
end

end_leases_of_the_absent()
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
    release(id, look_up(id), now)
  end
end

-- Takes the ended jobs whose record has expired out of the index. The next to expire is the first of its list.
local function forget_expired(name, most)
  local tenant, last = string.match(name, '^[^:]*'), 0 -- one is enough to see that nothing has expired
  local ids = {}
  repeat
    local noted = redis.call('LRANGE', ended_key(name), #ids, last)
    last = most - 1
    for _, ended in ipairs(noted) do
      local id, worker, pairs_of_job, session = string.match(ended, '^([^\n]*)\n([^\n]*)\n([^\n]*)\n(.*)$')
      if redis.call('EXISTS', job_key(id)) == 1 then noted = {} break end
      take_from_sets(id, tenant, session, worker, pairs_of_job)
      ids[#ids + 1] = id
    end
  until #noted == 0 or #ids >= most
  if #ids > 0 then
    redis.call('ZREM', shelf_key(name), unpack(ids))
    redis.call('LTRIM', ended_key(name), #ids, -1)
  end
  if redis.call('EXISTS', shelf_key(name), ended_key(name)) == 0 then redis.call('SREM', shelves, name) end
  return #ids
end

local left = tonumber(ARGV[11])
for _, name in ipairs(redis.call('SMEMBERS', shelves)) do
  if left > 0 then left = left - forget_expired(name, left) end
end
return swept
