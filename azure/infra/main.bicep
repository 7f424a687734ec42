// One resource group with all that llmkit needs on Azure: a workspace and what stands behind it, identities with the
// roles that they need and no more, a managed network so that nodes have no public address, private networking and a
// budget as options. Clusters and endpoints are not here: `llmkit azure up` and the deployment files make them.
targetScope = 'resourceGroup'

@description('Begins all names: small letters.')
@minLength(3)
@maxLength(10)
param name string = 'llmkit'

@description('Ends the names that must differ from everybody else\'s. Give another one to build anew within the days that a deleted key vault keeps its name.')
@minLength(4)
@maxLength(8)
param suffix string = take(uniqueString(resourceGroup().id), 6)

@description('Region; it needs quota for the machine sizes in azure/compute_configs.')
param location string = resourceGroup().location

@description('Put on every resource.')
param tags object = {
  project: name
}

@description('Object ids of the people who train and deploy.')
param people array = []

@description('OWNER/NAME on GitHub whose workflow deploys; empty makes no identity for it.')
param githubRepository string = ''

@description('Close workspace, storage, vault and registry to the internet and reach them through private endpoints.')
param privateNetwork bool = false

@description('Address space of the virtual network that privateNetwork makes.')
param addressPrefix string = '10.40.0.0/16'

@description('Part of it for the private endpoints.')
param subnetPrefix string = '10.40.0.0/24'

@description('Days that logs are kept.')
@minValue(30)
@maxValue(730)
param logDays int = 30

@description('Amount a month, in the subscription\'s currency, at whose 80 % a mail is sent; 0 makes no budget.')
@minValue(0)
param budget int = 0

@description('Who gets that mail.')
param budgetMails array = []

@description('First of the month from which the budget counts.')
param budgetStart string = utcNow('yyyy-MM-01')

var publicAccess = privateNetwork ? 'Disabled' : 'Enabled'

module monitoring 'modules/monitoring.bicep' = {
  name: 'monitoring'
  params: {
    name: name
    location: location
    tags: tags
    logDays: logDays
  }
}

module identities 'modules/identities.bicep' = {
  name: 'identities'
  params: {
    name: name
    location: location
    tags: tags
    githubRepository: githubRepository
  }
}

module storage 'modules/storage.bicep' = {
  name: 'storage'
  params: {
    name: 'st${name}${suffix}'
    location: location
    tags: tags
    publicAccess: publicAccess
    logsId: monitoring.outputs.logsId
  }
}

module vault 'modules/vault.bicep' = {
  name: 'vault'
  params: {
    name: 'kv-${name}-${suffix}'
    location: location
    tags: tags
    publicAccess: publicAccess
    logsId: monitoring.outputs.logsId
  }
}

module registry 'modules/registry.bicep' = {
  name: 'registry'
  params: {
    name: 'cr${name}${suffix}'
    location: location
    tags: tags
    publicAccess: publicAccess
    logsId: monitoring.outputs.logsId
  }
}

module roles 'modules/roles.bicep' = {
  name: 'roles'
  params: {
    storageName: storage.outputs.name
    vaultName: vault.outputs.name
    registryName: registry.outputs.name
    insightsName: monitoring.outputs.insightsName
    workspacePrincipalId: identities.outputs.workspacePrincipalId
    computePrincipalId: identities.outputs.computePrincipalId
    endpointPrincipalId: identities.outputs.endpointPrincipalId
    workflowPrincipalId: identities.outputs.workflowPrincipalId
    withWorkflow: !empty(githubRepository)
    people: people
  }
}

module workspace 'modules/workspace.bicep' = {
  name: 'workspace'
  params: {
    name: 'mlw-${name}'
    location: location
    tags: tags
    publicAccess: publicAccess
    identityId: identities.outputs.workspaceId
    storageId: storage.outputs.id
    vaultId: vault.outputs.id
    registryId: registry.outputs.id
    insightsId: monitoring.outputs.insightsId
    logsId: monitoring.outputs.logsId
  }
  // The service takes the identity's roles for granted when it makes the workspace.
  dependsOn: [
    roles
  ]
}

module access 'modules/access.bicep' = {
  name: 'access'
  params: {
    workspaceName: workspace.outputs.name
    computeIdentityName: identities.outputs.computeName
    endpointIdentityName: identities.outputs.endpointName
    workspacePrincipalId: identities.outputs.workspacePrincipalId
    computePrincipalId: identities.outputs.computePrincipalId
    endpointPrincipalId: identities.outputs.endpointPrincipalId
    workflowPrincipalId: identities.outputs.workflowPrincipalId
    withWorkflow: !empty(githubRepository)
    people: people
  }
}

module network 'modules/network.bicep' = if (privateNetwork) {
  name: 'network'
  params: {
    name: name
    location: location
    tags: tags
    addressPrefix: addressPrefix
    subnetPrefix: subnetPrefix
    workspaceId: workspace.outputs.id
    storageId: storage.outputs.id
    vaultId: vault.outputs.id
    registryId: registry.outputs.id
  }
}

module spending 'modules/budget.bicep' = if (budget > 0) {
  name: 'budget'
  params: {
    name: 'budget-${name}'
    amount: budget
    mails: budgetMails
    start: budgetStart
  }
}

output workspace string = workspace.outputs.name
output registry string = registry.outputs.name
output registryServer string = registry.outputs.server
output storage string = storage.outputs.name
output insights string = monitoring.outputs.insightsName
output computeIdentity string = identities.outputs.computeName
output endpointIdentity string = identities.outputs.endpointName

@description('AZURE_CLIENT_ID of the workflow; empty without githubRepository.')
output workflowClientId string = identities.outputs.workflowClientId
