-- Gives a worker claimable jobs, oldest first, up to as many as it asks for, and opens an attempt of each.
-- KEYS[1] the queue
-- ARGV: 1 prefix, 2 worker id, 3 most jobs, 4 run timeout in ms, 5 time to live of an unfinished job in ms, 6 how much
--       of it is enough, 7 retention in ms, 8 the payload of the error marker of a job for which nobody waits any more
-- Returns nothing if the worker holds no lease, since nobody would notice its death, if it drains, or if the queue is paused.
-- Otherwise a list of {job id, attempt, started ms, accepted ms, traceparent, tracestate, request, arq's job}, and in a
-- session what its last whole turn left, '' if nothing, unless that is large: then the worker asks for it. Ids whose job is
-- gone, has ended or must not start any more are dropped on the way. Of a job that was given up the list has {job id, 0}.

local worker, now = ARGV[2], now_ms()
local lease_end = redis.call('ZSCORE', workers, worker)
if not lease_end or tonumber(lease_end) <= now or redis.call('EXISTS', paused) == 1 then return {} end
if redis.call('HGET', worker_key(worker), 'draining') then
  if redis.call('ZCARD', KEYS[1]) > 0 then ring() end -- the bell that it heard is for somebody else
  return {}
end

-- Whoever waits for a job listens to its stream. Perhaps nobody does at first, since the submission may overtake the
-- subscription, nor while an API process connects again, which it may notice late: a job that nobody listens to is looked
-- at again and again, and given up if that has not changed for longer than a lost connection goes unnoticed.
local LISTENED_TO_WITHIN_MS, LOOK_AGAIN_MS, LOOKED_WITHIN_MS, GIVEN_UP_AFTER_MS = 1000, 500, 2500, 25000

-- Whether somebody waits for the answer, as far as somebody has to. If not, the job is put back, or given up.
local given_up = {}
local function is_wanted(id, job)
  local accepted_ms, waiters = tonumber(job[4]), job[5]
  if not waiters or now - accepted_ms < LISTENED_TO_WITHIN_MS then return true end
  if subscribers({stream_channel(id)})[1] > 0 then
    if job[6] then redis.call('HDEL', job_key(id), 'unheard_ms') end
    return true
  end
  local since, looked = string.match(job[6] or '', '^(%d+) (%d+)$')
  if not since or now - tonumber(looked) > LOOKED_WITHIN_MS then since = int(now) end -- nobody knows what was in between
  if now - tonumber(since) >= GIVEN_UP_AFTER_MS then
    end_from_outside(id, ARGV[8], 'cancelled', now, ARGV[7])
    given_up[#given_up + 1] = {id, 0}
    return false
  end
  redis.call('HSET', job_key(id), 'unheard_ms', since .. ' ' .. int(now))
  redis.call('ZADD', KEYS[1], int(now + LOOK_AGAIN_MS), id)
  return false
end

local LARGE_STATE_BYTES = 65536 -- a claim may be of many jobs

local claimed, ids, out_of_memory = {}, {}, false
local most, ttl_ms, enough_ms = tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local started, deadline = int(now), int(now + tonumber(ARGV[4]))
local waiting = redis.call('ZRANGE', KEYS[1], 0, int(most), 'WITHSCORES') -- cheaper than by score
for i = 1, math.min(2 * most, #waiting), 2 do
  local id = waiting[i]
  if tonumber(waiting[i + 1]) > now then break end
  local record, stream = job_key(id), stream_key(id)
  local job = redis.call('HMGET', record, 'status', 'attempt', 'opened', 'accepted_ms', 'waiters', 'unheard_ms',
                         'deadline_ms', 'tenant', 'kind', 'store', 'model', 'traceparent', 'tracestate', 'session')
  if job[1] ~= 'queued' or tonumber(job[7]) <= now then -- past its deadline it is the sweep's
    redis.call('ZREM', KEYS[1], id)
  elseif is_wanted(id, job) then
    local attempt = job[2]
    if job[3] ~= attempt then -- otherwise recovery has opened it already, to fence the one before
      attempt = int(tonumber(attempt) + 1)
      local opened = redis.pcall('XADD', stream, attempt .. '-0', 'open', worker)
      if type(opened) == 'table' and opened.err then -- out of memory: keep what is claimed, leave the rest queued
        if #claimed == 0 then return opened end
        out_of_memory = true
        break
      end
      redis.call('PEXPIRE', stream, ARGV[5])
      redis.call('PUBLISH', stream_channel(id), attempt .. '-0 open ' .. worker)
    end
    redis.call('SADD', worker_jobs_key(worker), id)
    redis.call('HSET', record, 'status', 'running', 'attempt', attempt, 'opened', attempt, 'worker', worker,
               'started_ms', started, 'deadline_ms', deadline)
    redis.call('ZREM', shelf_key(shelf_of(job[8], job[9], job[10], 'queued', '', job[11])), id)
    put_on_shelf(shelf_of(job[8], job[9], job[10], 'running', '', job[11]), id, job[4], ttl_ms)
    redis.call('ZADD', deadlines, deadline, id)
    local request, arq_job = request_key(id), arq_job_key(id)
    if redis.call('PTTL', record) < enough_ms then
      for _, key in ipairs({record, request, attachments_key(id), stream, arq_job, turns_key(job[14] or '')}) do
        redis.call('PEXPIRE', key, ARGV[5])
      end
    end
    ids[#ids + 1] = id
    local given = redis.call('MGET', request, arq_job)
    local row = {id, attempt, started, job[4], job[12], job[13], given[1], given[2]}
    if job[14] and job[14] ~= '' then
      local state = session_key(job[14])
      if redis.call('STRLEN', state) < LARGE_STATE_BYTES then row[9] = redis.call('GET', state) or '' end
    end
    claimed[#claimed + 1] = row
  end
end
if #ids > 0 then
  redis.call('ZREM', KEYS[1], unpack(ids))
  redis.call('PEXPIRE', worker_jobs_key(worker), ARGV[5])
end

local leaves_some = #waiting > 2 * most and tonumber(waiting[#waiting]) <= now
if leaves_some or out_of_memory or #given_up > 0 then ring() else redis.call('DEL', bell) end
for _, row in ipairs(given_up) do claimed[#claimed + 1] = row end
return claimed
