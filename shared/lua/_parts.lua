-- Parts of several scripts. Those that a script uses are put before it, after the key names (shared/scripts.py).
-- Each begins with `local` at the beginning of a line, and uses only what stands above it.

local function int(number) return string.format('%.0f', number) end

-- Redis's clock, in ms: the only clock that the protocol knows, so that hosts need not agree on the time.
local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- How long a worker that was present may be without a subscriber of its channel and without a beat.
local ABSENCE_MS = 200

-- How many connections listen to each of these channels, in their order.
local function subscribers(channels)
  local counts, reply = {}, redis.call('PUBSUB', 'NUMSUB', unpack(channels))
  for i = 1, #channels do counts[i] = tonumber(reply[2 * i]) end
  return counts
end

-- Which process this Redis is: all subscriptions end with it, and the data may not. Nil if it does not say.
local function server_run_id()
  local info = redis.pcall('INFO', 'server')
  return type(info) == 'string' and string.match(info, 'run_id:(%x+)') or nil
end
-- Lets what follows in this script write although Redis is out of memory. Redis asks for memory only before the first
-- write of a script, since it cannot stop in the middle; this one deletes nothing. What ends a job or keeps a lease has
-- to work exactly then: ending jobs is what frees memory.
local function even_without_memory() redis.call('DEL', P .. ':nothing') end

-- Wakes one worker. One token is enough: a worker that leaves claimable jobs behind rings for the next.
local function ring()
  if redis.call('LLEN', bell) == 0 then
    redis.call('LPUSH', bell, '1')
    redis.call('PEXPIRE', bell, 60000)
  end
end

local function make_claimable(id, now)
  redis.call('ZADD', queue, int(now), id)
  ring()
end

-- Lets the oldest turn of a session that still waits be claimed. Ids whose job is gone are dropped on the way.
local function promote_next_turn(turns, now)
  local id = redis.call('LINDEX', turns, 0)
  while id do
    local job = redis.call('HMGET', job_key(id), 'status', 'accepted_ms')
    if job[1] == 'queued' then
      if job[2] ~= int(now) then redis.call('HSET', job_key(id), 'promoted_ms', int(now)) end
      make_claimable(id, now)
      return
    end
    redis.call('LPOP', turns)
    id = redis.call('LINDEX', turns, 0)
  end
end

-- The index. Each job is on one shelf, with the jobs of its tenant that are like it; the record says on which. What may be
-- asked of a job beyond that has a sorted set of its own. The score is the instant of acceptance, which never changes.
local function shelf_of(tenant, kind, store, status, code, model)
  return (tenant or '') .. ':' .. (kind or '') .. ':' .. (store or '0') .. ':' .. status .. ':' .. code .. ':' .. (model or '')
end

-- Renews a key of the index before it is as near to its end as the job that is put there. True if it did.
local function keep(key, ttl_ms)
  if redis.call('PTTL', key) >= ttl_ms then return false end
  redis.call('PEXPIRE', key, int(2 * ttl_ms))
  return true
end

local function put_on_shelf(name, id, accepted_ms, ttl_ms)
  local shelf = shelf_key(name)
  redis.call('ZADD', shelf, accepted_ms, id)
  if keep(shelf, ttl_ms) then
    redis.call('PEXPIRE', ended_key(name), int(2 * ttl_ms))
    redis.call('SADD', shelves, name)
    keep(shelves, 2 * ttl_ms)
  end
end

local function put_among(key, id, accepted_ms, ttl_ms)
  redis.call('ZADD', key, accepted_ms, id)
  keep(key, ttl_ms)
end

local function put_among_pairs(tenant, pairs_of_job, id, accepted_ms, ttl_ms)
  for digest in string.gmatch(pairs_of_job or '', '%S+') do
    put_among(pair_jobs_key(tenant .. ':' .. digest), id, accepted_ms, ttl_ms)
  end
end

local function take_from_sets(id, tenant, session, worker, pairs_of_job)
  if session ~= '' then redis.call('ZREM', session_jobs_key(session), id) end
  if worker ~= '' then redis.call('ZREM', worker_jobs_ended_badly_key(worker), id) end
  for digest in string.gmatch(pairs_of_job, '%S+') do redis.call('ZREM', pair_jobs_key(tenant .. ':' .. digest), id) end
end

-- What is needed to take an ended job out of the index when its record has expired.
local function note_ended(name, id, worker, pairs_of_job, session)
  redis.call('RPUSH', ended_key(name), table.concat({id, worker, pairs_of_job or '', session or ''}, '\n'))
end

-- What has to be known of a job to end it or to release it.
local function look_up(id)
  local job = redis.call('HMGET', job_key(id), 'status', 'worker', 'attempt', 'session', 'tenant', 'kind', 'store',
                         'model', 'accepted_ms', 'pairs')
  return {status = job[1], worker = job[2], attempt = job[3], session = job[4], tenant = job[5], kind = job[6],
          store = job[7], model = job[8], accepted_ms = job[9], pairs = job[10]}
end

local function error_code(payload)
  if not payload then return '' end
  return string.match(payload, '^{"code":"([%w_]+)"') or 'other'
end

-- The record of an unfinished job is gone, and nobody knows any more on which shelf it was.
local function take_from_unfinished(id)
  for _, name in ipairs(redis.call('SMEMBERS', shelves)) do
    if string.find(name, ':queued::', 1, true) or string.find(name, ':running::', 1, true) then
      redis.call('ZREM', shelf_key(name), id)
    end
  end
end

-- How long a job that has ended may keep its session, until its worker says that it has stopped.
local RELEASE_MS = 15000

-- The job has ended, and executes nowhere any more: its worker's slot and its session are free.
local function release(id, job, now)
  redis.call('ZREM', deadlines, id)
  if not job.session then take_from_unfinished(id) end
  if job.worker and job.worker ~= '' then redis.call('SREM', worker_jobs_key(job.worker), id) end
  if job.session and job.session ~= '' then
    local turns = turns_key(job.session)
    local was_head = redis.call('LINDEX', turns, 0) == id
    redis.call('LREM', turns, 1, id)
    if was_head then promote_next_turn(turns, now) end
  end
end

-- How many webhooks may be pending. More means that endpoints have been away for long; they must not fill the memory.
local MAX_PENDING_WEBHOOKS = 100000

-- The webhook of a job, if it has one, becomes due with the job's end. If too many are pending, the one that is due
-- last is given up: it has failed most often.
local function queue_webhook(id, status, payload, now)
  local keep_ms = redis.call('HGET', webhook_key(id), 'keep_ms')
  if not keep_ms then return end
  if redis.call('ZCARD', webhooks) >= MAX_PENDING_WEBHOOKS then
    local last = redis.call('ZREVRANGE', webhooks, 0, 0)[1]
    redis.call('ZREM', webhooks, last)
    if redis.call('EXISTS', webhook_key(last)) == 1 then redis.call('HSET', webhook_key(last), 'state', 'given_up') end
  end
  redis.call('HSET', webhook_key(id), 'state', 'pending', 'status', status, 'marker', payload, 'ended_ms', int(now))
  redis.call('PEXPIRE', webhook_key(id), keep_ms)
  redis.call('ZADD', webhooks, int(now), id)
  redis.call('PEXPIRE', webhooks, int(math.max(redis.call('PTTL', webhooks), tonumber(keep_ms))))
end

-- Appends the marker and makes the job terminal. The append comes first: if Redis refuses it, nothing has changed.
-- Behind the retention come more fields and values of the record.
local function end_job(id, job, entry_id, kind, payload, status, now, retention_ms, ...)
  local record, stream = job_key(id), stream_key(id)
  redis.call('XADD', stream, entry_id, kind, payload)
  local code, ttl_ms = kind == 'error' and error_code(payload) or '', tonumber(retention_ms)
  local shelf = shelf_of(job.tenant, job.kind, job.store, status, code, job.model)
  local worker = status == 'succeeded' and '' or job.worker -- what it did well is looked for one by one
  redis.call('ZREM', shelf_key(shelf_of(job.tenant, job.kind, job.store, job.status, '', job.model)), id)
  note_ended(shelf, id, worker, job.pairs, job.session)
  put_on_shelf(shelf, id, job.accepted_ms, ttl_ms)
  if worker ~= '' then put_among(worker_jobs_ended_badly_key(worker), id, job.accepted_ms, ttl_ms) end
  redis.call('HSET', record, 'status', status, 'finished_ms', int(now), ...)
  if kind == 'error' then redis.call('HSET', record, 'error', payload) end
  if job.status == 'queued' then redis.call('ZREM', queue, id) end
  redis.call('UNLINK', arq_job_key(id), attachments_key(id))
  redis.call('PEXPIRE', record, retention_ms)
  redis.call('PEXPIRE', request_key(id), retention_ms)
  redis.call('PEXPIRE', stream, retention_ms)
  redis.call('PUBLISH', stream_channel(id), entry_id .. ' ' .. kind .. ' ' .. payload)
  queue_webhook(id, status, payload, now)
end

-- How much was said, as far as it has: for readers, which know by it that they have seen the end.
local function note_entries(id)
  local last = redis.call('XREVRANGE', stream_key(id), '+', '-', 'COUNT', 1)
  if #last == 1 then redis.call('HSET', job_key(id), 'entries', string.match(last[1][1], '%d+$')) end
end

-- The job has ended, but may still execute: whoever executes it releases it, or the sweep does after a while.
local function await_release(id, now) redis.call('ZADD', deadlines, int(now + RELEASE_MS), id) end

-- Ends a job from outside of its attempt. The marker opens attempt n+1, so that whoever still runs attempt n is fenced.
-- A worker that may still execute it is told to stop, and releases the job when it has.
local function end_from_outside(id, payload, status, now, retention_ms)
  note_entries(id)
  local job = look_up(id)
  end_job(id, job, int(tonumber(job.attempt) + 1) .. '-0', 'error', payload, status, now, retention_ms)
  if job.status == 'running' then
    await_release(id, now)
    redis.call('PUBLISH', worker_channel(job.worker), 'stop ' .. id)
  else
    release(id, job, now)
  end
end

local function is_terminal(status)
  return status == 'succeeded' or status == 'failed' or status == 'cancelled'
end
